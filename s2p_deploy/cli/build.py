"""``s2p-deploy build``: an ExportedGraph to an Engine."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from s2p_deploy.cli.options import ForceOption, JsonOption, OutFolder
from s2p_deploy.cli.outcome import artifact_outcome, show
from s2p_deploy.cli.progress_bars import progress_bars
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from s2p_deploy.engines import ShapeProfile, Span
    from s2p_deploy.engines.options import Lowering
    from s2p_deploy.records.engine import SitePrecision

_LOWERINGS: tuple[Lowering, ...] = ("auto", "rescale", "runtime_q")
_QUANTIZED_BITS = 8  # activations of at most so many are integers
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


SpanOption = Annotated[
    str | None,
    typer.Option(
        metavar="MIN:OPT:MAX",
        help="Sizes of the latents (an eighth of the picture's), of a graph with --sizes dynamic; where left out, the "
        "trained one.",
    ),
]


def build(  # noqa: PLR0913 - its options
    graph: Annotated[Path, typer.Argument(metavar="GRAPH", help="What export wrote.")],
    *,
    backend: Annotated[str, typer.Option(help="onnxruntime, openvino, tensorrt_rtx or tensorrt.")],
    out: OutFolder,
    hint: Annotated[str | None, typer.Option(help="Precision hint of the backend, e.g. f32 or bf16.")] = None,
    batch: Annotated[
        str, typer.Option(metavar="MIN:OPT:MAX", help="Batch sizes: the smallest, the one to tune for, the largest.")
    ] = "1:2:32",
    height: SpanOption = None,
    width: SpanOption = None,
    lowering: Annotated[str, typer.Option(help="Form of timestep-dependent scales: auto, rescale or runtime_q.")] = (
        "auto"
    ),
    static_tolerance: Annotated[
        float, typer.Option(metavar="X", help="Scales that vary over the rows by no more than X (0.02: 2 %) are fixed.")
    ] = 0.0,
    refit: Annotated[bool, typer.Option(help="TensorRT: the same weights can be put in again.")] = False,
    stripped: Annotated[bool, typer.Option(help="TensorRT: no weights; they come from GRAPH at loading.")] = False,
    memory_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most memory of the build's process, e.g. 8G or 512MiB.")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Longest that the build may take.")] = 3600.0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Build a backend's engine from the graph, in a child process."""
    from s2p_deploy.records import ExportedGraph

    opened = ExportedGraph.open(graph)
    from s2p_deploy.engines import BuildOptions, Limits, build_engine
    from s2p_deploy.engines.build import check_build
    from s2p_deploy.engines.preflight import estimate

    options = BuildOptions(
        hint,
        profile=replace(
            profile_from_option(batch),
            height=span_from_option("--height", height),
            width=span_from_option("--width", width),
        ),
        lowering=lowering_from_option(lowering),
        static_tolerance=tolerance_from_option(static_tolerance),
        refit=refit,
        stripped=stripped,
    )
    limits = Limits(seconds_from_option(timeout), None if memory_limit is None else bytes_from_option(memory_limit))
    options = check_build(opened, backend, out, options, limits, replace=force)
    needed = estimate(opened, backend)
    sys.stderr.write(f"build: {needed}\n")
    with progress_bars() as progress:
        made = build_engine(opened, backend, out, options=options, replace=force, limits=limits, progress=progress)
    took = {name: made.manifest.content[name] for name in ("build_seconds", "peak_rss_bytes")}
    outcome = artifact_outcome(made.folder, made.manifest)
    types = quantized_sites(made.sites)
    told = (*outcome.text, precision_line(len(made.sites), types))
    data = outcome.data | {"estimate": asdict(needed), "quantized_sites": types} | took
    return show(replace(outcome, data=data, text=told), as_json=as_json)


def quantized_sites(sites: Sequence[SitePrecision]) -> dict[str, int]:
    """How many of the sites with quantized activations the backend says to compute in which type, most first."""
    return dict(Counter(site.compute for site in sites if site.activation_bits <= _QUANTIZED_BITS).most_common())


def precision_line(sites: int, types: Mapping[str, int]) -> str:
    """What :func:`quantized_sites` found among so many sites, in words."""
    if not types:
        return f"none of {sites} sites has quantized activations"
    listed = ", ".join(f"{name} ({count})" for name, count in types.items())
    return f"{sum(types.values())} of {sites} sites have quantized activations, computed in {listed}"


def profile_from_option(text: str) -> ShapeProfile:
    """``MIN:OPT:MAX`` as batch sizes. Raises InputError where it is anything else."""
    from s2p_deploy.engines import ShapeProfile

    return ShapeProfile(*_three("--batch", text, "1:2:32"))


def span_from_option(option: str, text: str | None) -> Span | None:
    """``MIN:OPT:MAX`` as latent rows or columns. Raises InputError where it is anything else."""
    from s2p_deploy.engines import Span

    return None if text is None else Span(*_three(option, text, "64:64:128"))


def _three(option: str, text: str, example: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"\d{1,6}:\d{1,6}:\d{1,6}", text, re.ASCII):
        raise InputError(f"{option} {text!r} must be MIN:OPT:MAX, e.g. {example}")
    low, tuned, high = map(int, text.split(":"))
    return low, tuned, high


def lowering_from_option(name: str) -> Lowering:
    """A lowering by its name. Raises InputError for an unknown one."""
    for known in _LOWERINGS:
        if name == known:
            return known
    raise InputError(f"--lowering {name!r} is unknown: use {', '.join(_LOWERINGS)}")


def tolerance_from_option(value: float) -> float:
    """A fraction of at least zero. Raises InputError for anything else."""
    if not 0 <= value < float("inf"):
        raise InputError(f"--static-tolerance {value} must be a number of at least 0, e.g. 0.02")
    return value


def seconds_from_option(value: float) -> float:
    """A time above zero. Raises InputError for anything else."""
    if not 0 < value < float("inf"):
        raise InputError(f"--timeout {value} must be a number of seconds above 0")
    return value


def bytes_from_option(text: str) -> int:
    """A size such as ``8G``, ``1.5 GB`` or ``512MiB`` in bytes. Raises InputError for anything else."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([kmgt]i?)?b?", text.strip().lower(), re.ASCII)
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size <= 0:
        raise InputError(f"--memory-limit {text!r} must be a size above 0, e.g. 8G or 512MiB")
    return size
