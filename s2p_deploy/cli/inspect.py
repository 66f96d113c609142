"""``s2p-deploy inspect``: verifies any artifact and prints what it is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2p_deploy.cli.options import JsonOption
from s2p_deploy.cli.outcome import Outcome, show, table, two_columns
from s2p_deploy.cli.validate import gate_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from s2p_deploy.records import Manifest, PrecisionPlan, TimestepTable


def inspect(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that another command wrote.")],
    *,
    as_json: JsonOption = False,
) -> int:
    """Verify an artifact and print what it is, what it was made from and what is in it."""
    from s2p_deploy.records import read_manifest, verify_files

    manifest = read_manifest(artifact)
    verify_files(artifact, manifest)
    details = _DETAILS.get(manifest.kind, _no_details)(artifact, manifest)
    sizes = {name: (artifact / name).stat().st_size for name in manifest.files}
    data = {
        "kind": manifest.kind,
        "digest": manifest.digest,
        "verified": True,
        "tool": manifest.tool,
        "base": {"source": manifest.base.source, "digest": manifest.base.digest},
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
    for name, parent in manifest.parents.items():
        found = "" if (folder / parent.path).exists() else ", not there now"
        yield f"parent {name}", f"{parent.path} ({parent.digest[:16]}{found})"
    yield from _flat("recipe ", manifest.recipe)
    yield from ((key, value) for key, value in manifest.content.items() if isinstance(value, str | int | float))


def _flat(prefix: str, values: dict[str, Any]) -> Iterable[tuple[str, object]]:
    """Nested values under dotted names, as ``--set`` takes them."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield prefix + key, value


def _calibrated(folder: Path, _manifest: Manifest) -> tuple[RenderableType, ...]:
    from s2p_deploy.records import CalibratedModel

    model = CalibratedModel.open(folder)
    bits = model.manifest.content.get("average_bits", {})
    return (_rows(model.timesteps), *_average_bits(bits), *_plan(model.plan))


def _graph(folder: Path, manifest: Manifest) -> tuple[RenderableType, ...]:
    from s2p_deploy.records import ExportedGraph

    graph = ExportedGraph.open(folder)
    full = ", ".join(manifest.content.get("full_sites", [])) or "none"
    of_text = sum(site.graph == "text" for site in graph.sites)
    tensors = [("in", t.name, t.dtype, t.shape) for t in graph.inputs] + [
        ("out", t.name, t.dtype, t.shape) for t in graph.outputs
    ]
    return (
        _rows(graph.timesteps),
        two_columns([("sites in float32", full), ("sites in text.onnx", of_text or "none")]),
        table("Inputs and outputs", ("", "name", "type", "shape"), tensors),
        *_plan(graph.plan),
    )


def _engine(folder: Path, _manifest: Manifest) -> tuple[RenderableType, ...]:
    from s2p_deploy.records import Engine

    engine = Engine.open(folder)
    columns = ("site", "op", "lowering", "weight bits stored", "activation bits", "compute")
    sites = [(s.site, s.op, s.lowering, s.weight_storage_bits, s.activation_bits, s.compute) for s in engine.sites]
    kinds = Counter((op, *rest) for _, op, *rest in sites)
    return (
        _rows(engine.timesteps),
        two_columns((f"environment {name}", value) for name, value in engine.environment.items()),
        table(
            "Precision as the backend reports it", (*columns[1:], "sites"), ((*kind, n) for kind, n in kinds.items())
        ),
        table("Sites", columns, sites),
        *_layers(folder),
    )


def _layers(folder: Path) -> tuple[RenderableType, ...]:
    """The layers of a TensorRT engine, where the engine inspector could open it when it was built."""
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


def _no_details(_folder: Path, _manifest: Manifest) -> tuple[RenderableType, ...]:
    return ()


def _rows(timesteps: TimestepTable) -> RenderableType:
    first, last = timesteps.covered
    return two_columns(
        [
            ("scheduler", f"{timesteps.scheduler_class}, {timesteps.steps} steps"),
            ("rows", f"{timesteps.rows}, {len(timesteps.calibrated)} calibrated, usable from {first} to {last}"),
        ]
    )


def _average_bits(bits: dict[str, Any]) -> tuple[RenderableType, ...]:
    averages = {name: value for name, value in bits.items() if isinstance(value, dict)}
    if not averages:
        return ()
    rows = [(name.replace("_", " "), f"{a['weights']:.3f}", f"{a['activations']:.3f}") for name, a in averages.items()]
    rows.append(("floating point counts as", str(bits["floating_point"]), str(bits["floating_point"])))
    return (table("Average bits of the sites", ("weighted by", "weights", "activations"), rows),)


def _plan(plan: PrecisionPlan) -> tuple[RenderableType, ...]:
    formats = {point.name: point.activations for point in plan.act_points}
    varies = {point.name: point.timestep_dependent for point in plan.act_points}
    columns = ("site", "op", "weights", "activations", "varies with the timestep", "act point", "rule", "sensitivity")
    rows = [
        (
            s.site,
            s.op,
            s.weights,
            formats.get(s.act_point or "", "none"),
            varies.get(s.act_point or "", ""),
            s.act_point or "",
            s.rule,
            "" if s.sensitivity is None else f"{s.sensitivity:.3g}",
        )
        for s in plan.sites
    ]
    return (table(f"Plan: {len(plan.sites)} sites, {len(plan.act_points)} act points", columns, rows),)


_DETAILS = {"CalibratedModel": _calibrated, "ExportedGraph": _graph, "Engine": _engine, "ValidationReport": _report}
