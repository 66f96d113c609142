"""Traces of denoisers, each made once for the code as it is: one takes ten seconds and depends on its arguments."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from s2p_deploy.export import canonical_graph, tracing
from s2p_deploy.export.tracing import TracedDenoiser
from s2p_deploy.families import Block, Tap
from s2p_deploy.records import TimestepTable, TimeTable, TransformSpec
from tests.shared_folder import SharedFolder

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[1]
_GRAPH, _BLOCKS = "graph.onnx", "blocks.json"
_SIGNATURE = signature(tracing.trace_denoiser)


@dataclass(frozen=True)
class RememberedTraces:
    """Stands in for :func:`s2p_deploy.export.tracing.trace_denoiser`; every caller reads a graph of its own."""

    shared: SharedFolder

    def __call__(self, *arguments: object, **options: object) -> TracedDenoiser:
        """The trace, from the folder if these arguments were traced before."""

        def trace(folder: Path) -> None:
            write_trace(tracing.trace_denoiser(*arguments, **options), folder)  # type: ignore[arg-type]

        asked = _SIGNATURE.bind(*arguments, **options)
        asked.apply_defaults()
        outlines = {name: _outline(value) for name, value in asked.arguments.items()}
        name = sha256(json.dumps(outlines, sort_keys=True).encode()).hexdigest()
        return read_trace(self.shared.made(f"trace-{name[:32]}", trace))


def kept_traces() -> SharedFolder:
    """Keeps traces in build/, under the digest of all code that they depend on; unused ones go after a week."""
    code = sorted(
        path for name in ("families", "numerics", "records") for path in (ROOT / "s2p_deploy" / name).glob("*.py")
    )
    code += [*sorted((ROOT / "export").rglob("*.py")), Path(__file__)]
    versions = [f"{name} {version(name)}" for name in ("torch", "onnx-ir", "onnxscript", "diffusers", "transformers")]
    digest = sha256("\n".join([*versions, *(path.read_text(encoding="utf-8") for path in code)]).encode()).hexdigest()
    folder = ROOT / "build" / "traces"
    own = folder / digest[:16]
    own.mkdir(parents=True, exist_ok=True)
    own.touch()
    for other in folder.iterdir():
        if other.stat().st_mtime < time.time() - 7 * 24 * 3600:
            shutil.rmtree(other, ignore_errors=True)
    return SharedFolder(own)


def remember_traces(patch: pytest.MonkeyPatch, shared: SharedFolder) -> None:
    """Exports take their traces from ``shared`` from now on."""
    patch.setattr(canonical_graph, "trace_denoiser", RememberedTraces(shared))


def trace_anew(patch: pytest.MonkeyPatch) -> None:
    """Exports trace themselves, as they do outside tests."""
    patch.setattr(canonical_graph, "trace_denoiser", tracing.trace_denoiser)


def write_trace(traced: TracedDenoiser, folder: Path) -> None:
    """Initializers, which are parameters without data, are written as data in a file that is not there."""
    folder.mkdir()
    for name, value in traced.model.graph.initializers.items():
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor("none", 0, 0, value.dtype, shape=value.shape, name=name)
    (folder / _GRAPH).write_bytes(ir.to_proto(traced.model).SerializeToString())
    blocks = [dataclasses.asdict(block) for block in traced.blocks]
    (folder / _BLOCKS).write_text(json.dumps({"blocks": blocks, "optional": traced.optional}))


def read_trace(folder: Path) -> TracedDenoiser:
    """What :func:`write_trace` wrote."""
    model = ir.load(folder / _GRAPH)
    for value in model.graph.initializers.values():
        value.const_value = None
    noted = json.loads((folder / _BLOCKS).read_text())
    optional = {name: tuple(shape) for name, shape in noted["optional"].items()}
    return TracedDenoiser(model, tuple(map(_block, noted["blocks"])), optional)


def _block(data: dict[str, Any]) -> Block:
    taps = {side: tuple(Tap(**tap) for tap in data[side]) for side in ("entering", "leaving")}
    return Block(**data | taps | {"modules": tuple(data["modules"])})


def _outline(value: object) -> object:
    """What a trace can depend on: of a table of features its shape alone, for it is traced on the meta device."""
    if isinstance(value, TimeTable):
        return ["table", str(value.projections.dtype), value.projections.shape, value.slices]
    if isinstance(value, TimestepTable):
        arrays = [field.tobytes() for field in (value.angle, value.fractional) if field is not None]
        return ["timesteps", repr(value), [sha256(data).hexdigest() for data in arrays]]
    if isinstance(value, TransformSpec):
        return dataclasses.asdict(value)
    return str(value) if isinstance(value, torch.dtype) else value
