"""``s2p-deploy doctor``: what is installed here, what it can build and run, and what to install for the rest.

With ``--probe``, every installed backend is asked to build small patterns, and to run them where it can.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2p_deploy import __version__
from s2p_deploy.cli.options import JsonOption
from s2p_deploy.cli.outcome import Outcome, show, table, two_columns
from s2p_deploy.cli.progress_bars import progress_bars
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from s2p_deploy.engines import Capabilities
    from s2p_deploy.engines.support_tables import SupportTable

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


def doctor(
    *,
    probe: Annotated[
        bool, typer.Option("--probe", help="Build small patterns with every backend: what builds, fails, crashes.")
    ] = False,
    backend: Annotated[str | None, typer.Option(help="With --probe: this backend only.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Print versions, what this CPU is good at, and which backends build and run here."""
    if probe:
        return show(_probed(backend), as_json=as_json)
    if backend is not None:
        raise InputError("--backend goes with --probe")
    return show(_installed(), as_json=as_json)


def _installed() -> Outcome:
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
    return Outcome(data, text)


def _probed(backend: str | None) -> Outcome:
    """Probes, and puts the result where builds look for it."""
    from s2p_deploy.engines import backend_by_name, backend_names
    from s2p_deploy.engines.probe.run import probe_backend
    from s2p_deploy.engines.support_tables import write_to_cache

    installed = [name for name in backend_names() if backend_by_name(name).capabilities().missing is None]
    data: list[dict[str, Any]] = []
    text: list[Table | str] = []
    with progress_bars() as progress:
        for name in [backend] if backend is not None else installed:
            started = time.monotonic()
            found = probe_backend(name, progress=progress)
            path = write_to_cache(found)
            data.append(asdict(found) | {"seconds": round(time.monotonic() - started, 1), "path": str(path)})
            text += [*_probe_tables(found), f"written to {path}"]
    return Outcome({"probes": data}, tuple(text))


def _probe_tables(found: SupportTable) -> Iterator[Table]:
    from s2p_deploy.engines.probe.matrix import COLUMNS, EXECUTES_NOT, dtypes_of, matrix_rows, problems

    done = "built, not run" if found.key.device == EXECUTES_NOT else f"built and run on {found.key.device}"
    for dtype in dtypes_of(found):
        title = f"{found.key.backend} {found.key.version}, {dtype}, hint {found.hint}, {done}"
        yield table(title, COLUMNS, matrix_rows(found, dtype))
        reasons = [(p.verdict, p.detail, ", ".join(p.patterns)) for p in problems(found, dtype)]
        if reasons:
            yield table("Of those", ("verdict", "why", "patterns"), reasons)


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
