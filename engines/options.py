"""What a build may be asked for besides its backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from s2p_deploy.records import TensorSpec

Lowering = Literal["auto", "rescale", "runtime_q"]


@dataclass(frozen=True)
class ShapeProfile:
    """Batch sizes of an engine: the smallest, the one it is tuned for, the largest.

    TensorRT engines refuse others; the CPU backends take any.
    """

    minimum: int = 1
    optimum: int = 2
    maximum: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise InputError(f"batch profile {self.minimum}/{self.optimum}/{self.maximum} must be ascending from 1")

    def shape(self, spec: TensorSpec, batch: int, rows: int | None = None) -> tuple[int, ...]:
        """The sizes of a tensor at a batch size, and at a number of ``rows`` of the scale table where that varies too.

        Raises:
            InputError: another size is dynamic.
        """
        sizes = {"batch": batch} if rows is None else {"batch": batch, "rows": rows}
        other = [size for size in spec.shape if isinstance(size, str) and size not in sizes]
        if other:
            raise InputError(
                f"input {spec.name} has the dynamic size {other[0]!r}: only {' and '.join(sizes)} may be dynamic"
            )
        return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build; they travel to the child process as JSON and are recorded in the engine.

    ``hint`` is a precision hint of the backend's (None: its default). ``lowering`` says how timestep-dependent scales
    become operators (``auto``: what the backend takes, ``rescale`` where it takes several). Columns of the scale table
    that vary by no more than the fraction ``static_tolerance`` over the rows become constants. ``refit`` makes a
    TensorRT plan whose weights can be put in again, the same ones; ``stripped`` leaves them out of the plan: they come
    from the graph when the engine is loaded.
    """

    hint: str | None = None
    profile: ShapeProfile = field(default_factory=ShapeProfile)
    lowering: Lowering = "auto"
    static_tolerance: float = 0.0
    refit: bool = False
    stripped: bool = False

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> BuildOptions:
        """The options that ``dataclasses.asdict`` made a mapping of."""
        return BuildOptions(**{**data, "profile": ShapeProfile(**data["profile"])})
