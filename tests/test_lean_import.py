"""Heavy libraries are imported where they are used: the way in is light, and a missing backend stops nothing else."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "torch",
    "diffusers",
    "onnx",
    "onnxruntime",
    "openvino",
    "transformers",
    "matplotlib",
    "numpy",
    "pydantic",
    "yaml",
)
BACKENDS = ("openvino", "tensorrt", "tensorrt_rtx", "tensorrt_bindings", "tensorrt_rtx_bindings")
SERVING = ("fastapi", "greenlet", "prometheus_client", "tritonclient", "uvicorn")
STAGES = {
    "s2p_deploy": "s2p_deploy",
    "calib": "s2p_deploy.calib",
    "export": "s2p_deploy.export",
    "engines": "s2p_deploy.engines",
}

LOADED_HEAVY = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
print(json.dumps([name for name in json.loads(sys.argv[2]) if name in sys.modules]))
"""

FAILURES_WITH_BLOCKED = """
import importlib, json, sys
for name in json.loads(sys.argv[2]):
    sys.modules[name] = None  # importing it now raises ImportError
failures = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except Exception as error:
        failures[name] = repr(error)
print(json.dumps(failures))
"""


def answer_of(script: str, *arguments: str, cwd: Path) -> object:
    """What a fresh interpreter, started away from the checkout, prints last."""
    command = [sys.executable, "-c", script, *arguments]
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def modules_outside_backends() -> list[str]:
    """Every module, less the engines of OpenVINO and TensorRT, the kernels of GPUs, and what needs a missing extra."""
    names = []
    for folder, package in STAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names.append(".".join((package, *parts)).removesuffix(".__init__"))
    left_out = ["s2p_deploy.engines.openvino", "s2p_deploy.engines.tensorrt", "s2p_deploy.numerics.triton_kernels"]
    if any(importlib.util.find_spec(name) is None for name in SERVING):
        left_out.append("s2p_deploy.serve")
    names = [name for name in names if not name.endswith(".__main__")]
    return [name for name in names if not any(f"{name}.".startswith(f"{outer}.") for outer in left_out)]


@pytest.mark.parametrize("module", ["s2p_deploy", "s2p_deploy.cli"])
def test_the_way_in_is_light(module: str, tmp_path: Path) -> None:
    assert answer_of(LOADED_HEAVY, module, json.dumps(HEAVY), cwd=tmp_path) == []


def test_public_names_are_imported_when_they_are_used(tmp_path: Path) -> None:
    script = (
        "import json, sys\n"
        "from s2p_deploy import Context, InputError, PromptSet, Recipe, calibrate, load_engine\n"
        "print(json.dumps([name for name in json.loads(sys.argv[1]) if name in sys.modules]))"
    )
    assert answer_of(script, json.dumps(["torch", "diffusers", "onnx", "onnxruntime"]), cwd=tmp_path) == []


@pytest.mark.parametrize("module", ["build", "load"])
def test_the_processes_of_a_build_need_no_pytorch(module: str, tmp_path: Path) -> None:
    """Each would spend 5 s and 400 MB on imports."""
    heavy = json.dumps(["torch", "diffusers", "transformers"])
    assert answer_of(LOADED_HEAVY, f"s2p_deploy.engines.{module}", heavy, cwd=tmp_path) == []


def test_everything_else_imports_without_the_backends(tmp_path: Path) -> None:
    names = modules_outside_backends()
    assert "s2p_deploy.errors" in names
    assert answer_of(FAILURES_WITH_BLOCKED, json.dumps(names), json.dumps(BACKENDS), cwd=tmp_path) == {}
