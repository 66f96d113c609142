"""``s2p-deploy doctor``: what is installed here, what it can build and run, and what to install for the rest."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING

from s2p_deploy import __version__
from s2p_deploy.cli.options import JsonOption
from s2p_deploy.cli.output import Outcome, show, table, two_columns

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
    "avx512_bf16": "fast bf16 products, --precision bf16",
    "amx_int8": "INT8 matrix tiles",
    "amx_bf16": "bf16 matrix tiles, --precision bf16",
}


def doctor(
    *,
    as_json: JsonOption = False,
) -> int:
    """Show versions, what this CPU is good at and which backends work here."""
    return show(_installed(), as_json=as_json)


def _installed() -> Outcome:
    from s2p_deploy.engines import backend_by_name, backend_names
    from s2p_deploy.engines.machine import cpu_flags, distribution_version
    from s2p_deploy.engines.support import support_of

    libraries = {name: distribution_version(name) for name in _LIBRARIES}
    cpu_has = cpu_flags()
    backends = [backend_by_name(name).capabilities() for name in backend_names()]
    tables = {b.backend: support_of(b.backend) for b in backends if b.missing is None}
    support = {name: table.key.file_name if table.findings else None for name, table in tables.items()}
    data = {
        "s2p_deploy": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "libraries": libraries,
        "cpu_flags": {flag: flag in cpu_has for flag in _CPU_FLAGS},
        "backends": [asdict(backend) | {"support_table": support.get(backend.backend)} for backend in backends],
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
        table(
            "Backends",
            ("backend", "version", "builds", "runs", "precisions", "providers", "support table", "what to do"),
            (_backend_row(backend, support.get(backend.backend)) for backend in backends),
        ),
    )
    return Outcome(data, text)


def _backend_row(backend: Capabilities, support: str | None) -> tuple[str, ...]:
    usable = backend.missing is None
    advice = backend.missing or ("" if backend.executes else "its engines run on a machine with a GPU")
    return (
        backend.backend,
        backend.version or "",
        "yes" if usable else "no",
        "yes" if usable and backend.executes else "no",
        ", ".join(backend.precisions) or "the graph's",
        ", ".join(backend.providers),
        (support or "none: conservative forms") if usable else "",
        advice,
    )
