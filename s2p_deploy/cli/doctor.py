"""``s2p-deploy doctor``: what is installed here, what it can build and run, and what to install for the rest."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from s2p_deploy import __version__
from s2p_deploy.cli.options import JsonOption
from s2p_deploy.cli.outcome import Outcome, show, table, two_columns

if TYPE_CHECKING:
    from s2p_deploy.engines import Capabilities

_LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt-rtx",
    "tensorrt",
    "safetensors",
)
_CPU_FLAGS = {
    "avx2": "vectors of 256 bits",
    "avx512f": "vectors of 512 bits",
    "avx512_vnni": "fast INT8 products",
    "avx_vnni": "fast INT8 products, 256 bits",
    "avx512_bf16": "fast bf16 products, hint bf16",
    "amx_int8": "INT8 matrix tiles",
    "amx_bf16": "bf16 matrix tiles, hint bf16",
}


def doctor(*, as_json: JsonOption = False) -> int:
    """Print versions, what this CPU is good at, and which backends build and run here."""
    from s2p_deploy.engines import backend_by_name, backend_names

    libraries = {name: _version(name) for name in _LIBRARIES}
    cpu_has = _cpu_flags()
    backends = [backend_by_name(name).capabilities() for name in backend_names()]
    data = {
        "s2p_deploy": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "libraries": libraries,
        "cpu_flags": {flag: flag in cpu_has for flag in _CPU_FLAGS},
        "backends": [asdict(backend) for backend in backends],
    }
    head = [
        ("s2p_deploy", __version__),
        ("python", data["python"]),
        ("platform", data["platform"]),
        ("cores", data["cores"]),
    ]
    text = (
        two_columns(head),
        table(
            "Libraries", ("library", "version"), ((name, found or "not installed") for name, found in libraries.items())
        ),
        table(
            "CPU",
            ("flag", "here", "what for"),
            ((f, "yes" if f in cpu_has else "no", why) for f, why in _CPU_FLAGS.items()),
        ),
        table("Backends", ("backend", "version", "builds", "runs", "hints", "what to do"), map(_backend_row, backends)),
    )
    return show(Outcome(data, text), as_json=as_json)


def _backend_row(found: Capabilities) -> tuple[str, ...]:
    usable = found.missing is None
    advice = found.missing or ("" if found.executes else "its engines run on a machine with a GPU")
    return (
        found.backend,
        found.version or "",
        "yes" if usable else "no",
        "yes" if usable and found.executes else "no",
        ", ".join(found.hints),
        advice,
    )


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _cpu_flags() -> frozenset[str]:
    """Flags as Linux names them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())
