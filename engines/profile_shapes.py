"""Input shapes of an optimization profile."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from s2p_deploy.engines.options import ShapeProfile, Span
from s2p_deploy.errors import InputError
from s2p_deploy.records import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx

    from s2p_deploy.records import ExportedGraph

Shape = tuple[int, ...]
Shapes = dict[str, tuple[Shape, Shape, Shape]]

MOST_ROWS = 4096  # of the scale table, where they vary: dozens of schedules bound at once


def profile_shapes(inputs: Iterable[TensorSpec], profile: ShapeProfile, rows: int) -> Shapes:
    """Smallest, tuned-for and largest shape of every input.

    Where the graph leaves the ``rows`` of its scale table open, one profile spans 1 to 4096 and is tuned for ``rows``.

    Raises:
        InputError: a size is dynamic that neither the profile nor ``rows`` gives.
    """
    low = profile.sizes("minimum") | {"rows": 1}
    tuned = profile.sizes("optimum") | {"rows": min(rows, MOST_ROWS)}
    high = profile.sizes("maximum") | {"rows": MOST_ROWS}
    return {spec.name: (shape_at(spec, low), shape_at(spec, tuned), shape_at(spec, high)) for spec in inputs}


def shape_at(spec: TensorSpec, sizes: Mapping[str, int]) -> Shape:
    """The shape of a tensor whose dynamic sizes are given by name.

    Raises:
        InputError: another size is dynamic.
    """
    other = [size for size in spec.shape if isinstance(size, str) and size not in sizes]
    if other:
        raise InputError(
            f"input {spec.name} has the dynamic size {other[0]!r}: only {' and '.join(sizes)} may be dynamic"
        )
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def profile_for(graph: ExportedGraph, profile: ShapeProfile) -> ShapeProfile:
    """The profile with the heights and widths of latents that an engine of ``graph`` takes; left out, the trained ones.

    Raises:
        InputError: the graph has one size; a size is no multiple of what its network needs, or above its largest.
    """
    trained = graph.manifest.content.get("latents")
    if trained is not None:
        height, width = (
            _span(asked, trained[side], trained["multiple"], trained.get("largest"))
            for side, asked in (("height", profile.height), ("width", profile.width))
        )
        return replace(profile, height=height, width=width)
    if profile.height is not None or profile.width is not None:
        raise InputError(f"{graph.folder} takes latents of one size: export it with --sizes dynamic")
    return profile


def _span(asked: Span | None, trained: int, step: int, largest: int | None) -> Span:
    if asked is not None and largest is not None and asked.maximum > largest:
        raise InputError(
            f"a latent size of {asked.maximum} is above {largest}, the most that this network has positions for"
        )
    return Span(trained, trained, trained, step) if asked is None else replace(asked, step=step)


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    """Name and shape of an ONNX graph's input (its type is not read); a size without a name is ``?``."""
    sizes = value.type.tensor_type.shape.dim
    return TensorSpec(value.name, "", tuple(size.dim_param or size.dim_value or "?" for size in sizes))
