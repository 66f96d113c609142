"""What only a real process shows: start-up time, streams, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s2p_deploy import __version__
from tests.cli.commands import quick_settings

COMMAND = [sys.executable, "-c", "import sys; from s2p_deploy.cli import main; sys.exit(main())"]
SILENCING = (
    "TQDM_DISABLE",
    "TOKENIZERS_PARALLELISM",
    "PYTHONWARNINGS",
    "TRANSFORMERS_VERBOSITY",
    "DIFFUSERS_VERBOSITY",
)
LOADED = """
import json, sys
from s2p_deploy.cli import main
main(json.loads(sys.argv[1]))
print([name for name in sys.argv[2:] if name in sys.modules])
"""


def finished(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh process whose environment does not silence the libraries already."""
    env = {name: value for name, value in os.environ.items() if name not in SILENCING}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize("arguments", [["--help"], ["calibrate", "--help"], ["nonsense"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """The time of --help is that of what it imports, and a busy machine does not count."""
    heavy = ["torch", "numpy", "diffusers", "onnx", "onnxruntime", "openvino", "yaml", "jinja2", "fastapi"]
    if arguments == ["--help"]:
        heavy.append("pydantic")  # typer itself takes it to check the arguments of a command
    command = [sys.executable, "-c", LOADED, json.dumps(arguments), *heavy]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_shell_completion_names_the_commands() -> None:
    completing = {"_S2P_DEPLOY_COMPLETE": "complete_bash", "COMP_WORDS": "s2p-deploy ex", "COMP_CWORD": "1"}
    run = subprocess.run(COMMAND, capture_output=True, text=True, check=True, env=dict(os.environ) | completing)
    assert run.stdout.split() == ["export", "export-triton"]


def test_version() -> None:
    assert finished("--version").stdout == f"s2p-deploy {__version__}\n"


def test_a_stage_says_nothing_but_its_result(tmp_path: Path, prompts_file: Path) -> None:
    """Recipe fp has one stage, which reports its last tensor and nothing else."""
    out = str(tmp_path / "calib")
    run = finished("calibrate", "shapes", "--recipe", "fp", "--prompts", str(prompts_file), "--out", out, "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["kind"] == "CalibratedModel"
    assert run.stdout.count("\n") == 1
    assert re.fullmatch(r"write weights (\d+)/\1 \(\d+ s\)\n", run.stderr)


@pytest.mark.slow
def test_ctrl_c_in_calibrate_and_a_second_start(tmp_path: Path, prompts_file: Path) -> None:
    out = tmp_path / "calib"
    settings = quick_settings("training.iterations=60")
    command = [
        *COMMAND,
        "calibrate",
        "shapes",
        "--recipe",
        "w4a8",
        "--prompts",
        str(prompts_file),
        "--out",
        str(out),
        *settings,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    seen = ""
    while "starting error" not in seen:  # training is next
        line = process.stderr.readline()
        assert line, seen
        seen += line
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    stdout, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert stdout == ""
    assert [line for line in rest.splitlines() if line.startswith("s2p-deploy: ")] == [rest.splitlines()[-1]]
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert not out.exists()
    again = finished(*command[len(COMMAND) :])
    assert again.returncode == 0, again.stderr
    assert finished("inspect", str(out)).returncode == 0
    assert "dataset 2/" not in again.stderr
    assert "training 0/" not in again.stderr  # the interrupt left a checkpoint
    assert [path.name for path in tmp_path.iterdir()] == ["calib"]
