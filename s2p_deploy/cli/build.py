"""``s2p-deploy build``: an ExportedGraph to an Engine."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2p_deploy.cli.options import (
    BackendOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    OptimizationOption,
    OutFolder,
    PrecisionOption,
    ProviderOption,
    bytes_from_option,
    context_from_options,
)
from s2p_deploy.cli.output import artifact_outcome, show
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from s2p_deploy.engines import ShapeProfile, Span
    from s2p_deploy.engines.options import Lowering
    from s2p_deploy.records import ExportedGraph
    from s2p_deploy.records.engine import LayerPrecision

_LOWERINGS: tuple[Lowering, ...] = ("auto", "rescale", "runtime_q")
_QUANTIZED_BITS = 8  # activations of at most so many are integers


SpanOption = Annotated[
    str | None,
    typer.Option(
        metavar="MIN:OPT:MAX",
        help="Latent sizes (an eighth of the picture's), where any may be had; the trained one if omitted.",
    ),
]


def build(  # noqa: PLR0913 - its options
    graph: Annotated[Path, typer.Argument(metavar="GRAPH", help="A graph: the folder that export wrote.")],
    *,
    backend: BackendOption,
    out: OutFolder,
    precision: PrecisionOption = None,
    provider: ProviderOption = None,
    optimization: OptimizationOption = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="MIN:OPT:MAX",
            help="Batch sizes: the smallest, the one to tune for, the largest; what the GPU has memory for if omitted.",
        ),
    ] = None,
    height: SpanOption = None,
    width: SpanOption = None,
    chunks: Annotated[
        str | None,
        typer.Option(
            metavar="MIN:OPT:MAX",
            help="Chunks of text, where the graph takes several; all of these, tuned for the fewest, if omitted.",
        ),
    ] = None,
    lowering: Annotated[
        str, typer.Option(metavar="FORM", help="Form of timestep-dependent scales: auto, rescale or runtime_q.")
    ] = "auto",
    static_tolerance: Annotated[
        float,
        typer.Option(metavar="X", help="Scales that vary by at most X (0.02: 2 %) become constants."),
    ] = 0.0,
    refit: Annotated[bool, typer.Option(help="TensorRT: the same weights can be loaded again.")] = False,
    stripped: Annotated[bool, typer.Option(help="TensorRT: store no weights; loading reads GRAPH's.")] = False,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X.Y",
            help="TensorRT-RTX: a compute capability to build for, e.g. 7.5; may be given more than once. If omitted, "
            "all that the library has but 7.5.",
        ),
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory limit of the build, e.g. 8G or 512MiB.")
    ] = None,
    device: DeviceOption = "auto",
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Time limit of the build.")] = 3600.0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Build a backend's engine from a graph.

    The build runs in a child process with limits: a crash, too much memory or too much time is an error with the end of
    the backend's log (exit 1), and leaves nothing behind. One line on stderr says beforehand what memory, disk and time
    it is likely to take. The last line says in which type the backend, by its own report, computes the layers with
    quantized activations. TensorRT engines refuse other batch sizes than --batch, the CPU backends take any. Builders
    that need a GPU use that of --device.
    """
    from s2p_deploy import api
    from s2p_deploy.records import ExportedGraph

    opened = ExportedGraph.open(graph)
    from s2p_deploy.engines import BuildOptions, Limits
    from s2p_deploy.engines.build import check_build, default_profile_of, estimate

    options = BuildOptions(
        precision,
        provider,
        optimization,
        lowering=lowering_from_option(lowering),
        static_tolerance=tolerance_from_option(static_tolerance),
        refit=refit,
        stripped=stripped,
        compute_capabilities=tuple(dict.fromkeys(compute_capability or ())),
    )
    derived = default_profile_of(opened, backend, options, device) if batch is None else None
    profile = derived.profile if derived is not None else profile_from_option(str(batch))
    tall, wide = span_from_option("--height", height), span_from_option("--width", width)
    tokens = None if chunks is None else tokens_from_option(chunks, opened)
    options = replace(options, profile=replace(profile, height=tall, width=wide, tokens=tokens))
    limits = Limits(seconds_from_option(timeout), None if memory_limit is None else bytes_from_option(memory_limit))
    options = check_build(opened, backend, out, options, limits, replace=force, device=device)
    needed = estimate(opened, backend)
    sys.stderr.write(f"build: {needed}\n")
    if derived is not None and derived.reason:
        sys.stderr.write(f"build: {derived}\n")
    with context_from_options(device) as context:
        made = api.build_engine(
            opened, backend=backend, out=out, options=options, limits=limits, force=force, context=context
        )
    took = {name: made.manifest.content[name] for name in ("build_seconds", "peak_rss_bytes")}
    outcome = artifact_outcome(made.folder, made.manifest)
    types = quantized_layers(made.layers)
    notes = made.manifest.content["notes"]
    text = (*outcome.text, precision_line(len(made.layers), types), *gpu_lines(notes))
    data = outcome.data | {"estimate": asdict(needed), "quantized_layers": types, "notes": notes} | took
    return show(replace(outcome, data=data, text=text), as_json=as_json)


def quantized_layers(layers: Sequence[LayerPrecision]) -> dict[str, int]:
    """Counts the layers with quantized activations by the type that the backend reports to compute in, most first."""
    return dict(Counter(layer.compute for layer in layers if layer.activation_bits <= _QUANTIZED_BITS).most_common())


def precision_line(layers: int, types: Mapping[str, int]) -> str:
    """Puts the counts of :func:`quantized_layers` in words."""
    if not types:
        return f"none of {layers} layers has quantized activations"
    listed = ", ".join(f"{name} ({count})" for name, count in types.items())
    return f"{sum(types.values())} of {layers} layers have quantized activations, computed in {listed}"


def gpu_lines(notes: Mapping[str, Any]) -> tuple[str, ...]:
    """Says what an engine's notes tell about GPUs: what it is for, the memory that it takes, why it was not opened."""
    from s2p_deploy.engines.tensorrt.plan import PlanMemory

    lines = [f"for {notes['target']}"] if "target" in notes else []
    if "gpu_memory" in notes:
        lines.append(f"GPU memory: {PlanMemory(**notes['gpu_memory'])}")
    if "not inspected" in notes:
        lines.append(f"its layers were not inspected: {notes['not inspected']}")
    return tuple(lines)


def profile_from_option(text: str) -> ShapeProfile:
    """Parses ``MIN:OPT:MAX`` batch sizes. Raises InputError for anything else."""
    from s2p_deploy.engines import ShapeProfile

    return ShapeProfile(*_three("--batch", text, "1:2:32"))


def span_from_option(option: str, text: str | None) -> Span | None:
    """Parses ``MIN:OPT:MAX`` latent heights or widths. Raises InputError for anything else."""
    from s2p_deploy.engines import Span

    return None if text is None else Span(*_three(option, text, "64:64:128"))


def tokens_from_option(text: str, graph: ExportedGraph) -> Span:
    """Parses ``MIN:OPT:MAX`` chunks of a graph's text to tokens.

    Raises:
        InputError: it is anything else, or the graph takes one chunk alone.
    """
    from s2p_deploy.engines import Span

    counts = _three("--chunks", text, "1:1:4")
    if graph.chunks is None:
        raise InputError(f"{graph.folder} takes texts of one length: export it with --chunks")
    least, tuned, most = (graph.chunks.tokens * count for count in counts)
    return Span(least, tuned, most)


def _three(option: str, text: str, example: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"\d{1,6}:\d{1,6}:\d{1,6}", text, re.ASCII):
        raise InputError(f"{option} {text!r} must be MIN:OPT:MAX, e.g. {example}")
    low, tuned, high = map(int, text.split(":"))
    return low, tuned, high


def lowering_from_option(name: str) -> Lowering:
    """Checks the name of a lowering. Raises InputError for an unknown one."""
    for known in _LOWERINGS:
        if name == known:
            return known
    raise InputError(f"--lowering {name!r} is unknown: use {', '.join(_LOWERINGS)}")


def tolerance_from_option(value: float) -> float:
    """Checks a fraction of at least zero. Raises InputError for anything else."""
    if not 0 <= value < float("inf"):
        raise InputError(f"--static-tolerance {value} must be a number of at least 0, e.g. 0.02")
    return value


def seconds_from_option(value: float) -> float:
    """Checks a time above zero. Raises InputError for anything else."""
    if not 0 < value < float("inf"):
        raise InputError(f"--timeout {value} must be a number of seconds above 0")
    return value
