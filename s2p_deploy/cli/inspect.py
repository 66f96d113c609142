"""``s2p-deploy inspect``: verifies any artifact and prints what it is."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.cli.options import ArtifactArgument, JsonOption
from s2p_deploy.cli.output import Outcome, show, table, two_columns
from s2p_deploy.cli.validate import gate_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from s2p_deploy.records import Manifest, PrecisionPlan, TimestepTable


def inspect(
    artifact: ArtifactArgument,
    *,
    as_json: JsonOption = False,
) -> int:
    """Show what an artifact is, what it was made from and what is in it.

    Every file is verified first (exit 5 if one was changed).
    """
    from s2p_deploy.records import read_manifest
    from s2p_deploy.records.artifacts import verify_whole

    manifest = read_manifest(artifact)
    verify_whole(artifact, manifest)
    details = _DETAILS[manifest.kind](artifact, manifest) if manifest.kind in _DETAILS else ()
    sizes = {name: (artifact / name).stat().st_size for name in manifest.files}
    data = {
        "kind": manifest.kind,
        "digest": manifest.digest,
        "verified": True,
        "tool": manifest.tool,
        "base": asdict(manifest.base),
        "parents": {name: {"digest": p.digest, "path": p.path} for name, p in manifest.parents.items()},
        "recipe": manifest.recipe,
        "files": sizes,
        "content": manifest.content,
    }
    head = two_columns(_head(artifact, manifest))
    files = table(
        "Files", ("file", "bytes", "sha-256"), ((n, size, manifest.files[n][:16]) for n, size in sizes.items())
    )
    return show(Outcome(data, (head, *details, files)), as_json=as_json)


def _head(folder: Path, manifest: Manifest) -> Iterable[tuple[str, object]]:
    yield "kind", manifest.kind
    yield "digest", manifest.digest
    yield "verified", "every file matches the manifest"
    yield "written by", manifest.tool
    yield "base", f"{manifest.base.source} ({manifest.base.digest[:16]})"
    given = {name: value for name, value in asdict(manifest.base.options).items() if value}
    if given:
        yield "read with", ", ".join(f"{name} {value}" for name, value in given.items())
    for name, parent in manifest.parents.items():
        missing = "" if (folder / parent.path).exists() else ", not there now"
        yield f"parent {name}", f"{parent.path} ({parent.digest[:16]}{missing})"
    yield from _flat("recipe ", manifest.recipe)
    yield from ((key, value) for key, value in manifest.content.items() if isinstance(value, str | int | float))


def _flat(prefix: str, values: dict[str, Any]) -> Iterable[tuple[str, object]]:
    """Flattens nested values to dotted names, as ``--set`` takes them."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield prefix + key, value


def _calibrated(folder: Path, _manifest: Manifest) -> tuple[RenderableType, ...]:
    from s2p_deploy.records import CalibratedModel

    model = CalibratedModel.open(folder)
    bits = model.manifest.content.get("average_bits", {})
    return (_timesteps(model.timesteps), *_average_bits(bits), *_plan(model.plan))


def _graph(folder: Path, manifest: Manifest) -> tuple[RenderableType, ...]:
    from s2p_deploy.records import ExportedGraph

    graph = ExportedGraph.open(folder)
    full = ", ".join(manifest.content.get("float32_layers", [])) or "none"
    of_text = sum(layer.graph == "text" for layer in graph.layers)
    tensors = [("in", t.name, t.dtype, t.shape) for t in graph.inputs] + [
        ("out", t.name, t.dtype, t.shape) for t in graph.outputs
    ]
    chunks = graph.chunks
    text = "one length" if chunks is None else f"{chunks.fewest} to {chunks.most} chunks of {chunks.tokens} tokens"
    return (
        _timesteps(graph.timesteps),
        two_columns([("layers in float32", full), ("layers in text.onnx", of_text or "none"), ("text", text)]),
        table("Inputs and outputs", ("", "name", "type", "shape"), tensors),
        *_plan(graph.plan),
    )


def _engine(folder: Path, _manifest: Manifest) -> tuple[RenderableType, ...]:
    from s2p_deploy.records import Engine

    engine = Engine.open(folder)
    columns = ("layer", "op", "lowering", "weight bits stored", "activation bits", "compute")
    layers = [(s.name, s.op, s.lowering, s.weight_storage_bits, s.activation_bits, s.compute) for s in engine.layers]
    kinds = Counter((op, *rest) for _, op, *rest in layers)
    return (
        _timesteps(engine.timesteps),
        two_columns((f"environment {name}", value) for name, value in engine.environment.items()),
        table(
            "Precision as the backend reports it", (*columns[1:], "layers"), ((*kind, n) for kind, n in kinds.items())
        ),
        table("Layers", columns, layers),
        *_layers(folder),
    )


def _layers(folder: Path) -> tuple[RenderableType, ...]:
    """Tabulates the layers of a TensorRT engine, if TensorRT's inspector could open it when it was built."""
    file = folder / "layers.json"
    if not file.is_file():
        return ()
    layers = json.loads(file.read_text(encoding="utf-8"))["layers"]
    rows = (
        (layer["name"], layer["kind"], *(", ".join(map(str, layer[side])) for side in ("inputs", "outputs")))
        for layer in layers
    )
    return (table("Layers as the backend reports them", ("layer", "kind", "inputs", "outputs"), rows),)


def _report(folder: Path, _manifest: Manifest) -> tuple[RenderableType, ...]:
    from s2p_deploy.records import ValidationReport

    return (gate_table(ValidationReport.open(folder).gates),)


def _timesteps(timesteps: TimestepTable) -> RenderableType:
    first, last = timesteps.covered
    return two_columns(
        [
            ("scheduler", f"{timesteps.scheduler_class}, {timesteps.steps} steps"),
            (
                "timestep indices",
                f"{len(timesteps)}, {len(timesteps.calibrated)} calibrated, usable from {first} to {last}",
            ),
        ]
    )


def _average_bits(bits: dict[str, Any]) -> tuple[RenderableType, ...]:
    averages = {name: value for name, value in bits.items() if isinstance(value, dict)}
    if not averages:
        return ()
    rows = [(name.replace("_", " "), f"{a['weights']:.3f}", f"{a['activations']:.3f}") for name, a in averages.items()]
    rows.append(("floating point counts as", str(bits["floating_point"]), str(bits["floating_point"])))
    return (table("Average bits of the layers", ("weighted by", "weights", "activations"), rows),)


def _plan(plan: PrecisionPlan) -> tuple[RenderableType, ...]:
    formats = {quantizer.name: quantizer.activations for quantizer in plan.activation_quantizers}
    varies = {quantizer.name: quantizer.timestep_dependent for quantizer in plan.activation_quantizers}
    columns = (
        "layer",
        "op",
        "weights",
        "activations",
        "varies with the timestep",
        "activation quantizer",
        "rule",
        "sensitivity",
        "error of pictures",
    )
    rows = [
        (
            s.name,
            s.op,
            s.weights,
            formats.get(s.activation_quantizer or "", "none"),
            varies.get(s.activation_quantizer or "", ""),
            s.activation_quantizer or "",
            s.rule,
            "" if s.sensitivity is None else f"{s.sensitivity:.3g}",
            "" if s.picture_error is None else f"{s.picture_error:.3g}",
        )
        for s in plan.layers
    ]
    return (
        table(
            f"Plan: {len(plan.layers)} layers, {len(plan.activation_quantizers)} activation quantizers", columns, rows
        ),
    )


_DETAILS = {"CalibratedModel": _calibrated, "ExportedGraph": _graph, "Engine": _engine, "ValidationReport": _report}
