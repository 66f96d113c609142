"""Input shapes of an optimization profile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2p_deploy.records import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx

    from s2p_deploy.engines.options import ShapeProfile

Shape = tuple[int, ...]
Shapes = dict[str, tuple[Shape, Shape, Shape]]

MOST_ROWS = 4096  # of the scale table, where they vary: dozens of schedules bound at once


def profile_shapes(inputs: Iterable[TensorSpec], profile: ShapeProfile, rows: int) -> Shapes:
    """Smallest, tuned-for and largest shape of every input.

    Where the graph leaves the ``rows`` of its scale table open, one profile spans 1 to 4096 and is tuned for ``rows``.

    Raises:
        InputError: another size than ``batch`` and ``rows`` is dynamic.
    """
    low = (profile.minimum, 1)
    tuned = (profile.optimum, min(rows, MOST_ROWS))
    high = (profile.maximum, MOST_ROWS)
    return {
        spec.name: (profile.shape(spec, *low), profile.shape(spec, *tuned), profile.shape(spec, *high))
        for spec in inputs
    }


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    """Name and shape of an ONNX graph's input (its type is not read)."""
    sizes = value.type.tensor_type.shape.dim
    return TensorSpec(value.name, "", tuple(size.dim_param or size.dim_value for size in sizes))
