"""What a build may be asked for besides its backend."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

Lowering = Literal["auto", "rescale", "runtime_q"]


@dataclass(frozen=True)
class Span:
    """Latent rows or columns of an engine: fewest, tuned for, most; all are multiples of ``step``."""

    minimum: int
    optimum: int
    maximum: int
    step: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise InputError(f"sizes {self.minimum}:{self.optimum}:{self.maximum} must be ascending from 1")
        odd = [size for size in (self.minimum, self.optimum, self.maximum) if size % self.step]
        if odd:
            raise InputError(f"a latent size of {odd[0]} is no multiple of {self.step}, as this network needs")

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return str(self.minimum)
        return f"{self.minimum} to {self.maximum} in steps of {self.step}"

    def __contains__(self, size: int) -> bool:
        return self.minimum <= size <= self.maximum and size % self.step == 0


@dataclass(frozen=True)
class ShapeProfile:
    """Batch sizes of an engine: the smallest, the one it is tuned for, the largest.

    TensorRT engines refuse others; the CPU backends take any. Where a graph's latents may have any size, ``height`` and
    ``width`` say which ones the engine takes (None: the trained size); every backend's refuse others.
    """

    minimum: int = 1
    optimum: int = 2
    maximum: int = 32
    height: Span | None = None
    width: Span | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise InputError(f"batch profile {self.minimum}/{self.optimum}/{self.maximum} must be ascending from 1")

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ShapeProfile:
        """The profile that :meth:`to_json` made a mapping of."""
        height, width = _span(data.get("height")), _span(data.get("width"))
        return ShapeProfile(data["minimum"], data["optimum"], data["maximum"], height, width)

    def to_json(self) -> dict[str, Any]:
        """As a mapping; without height and width where those are fixed."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def sizes(self, end: Literal["minimum", "optimum", "maximum"]) -> dict[str, int]:
        """Every open size by its name in the graph."""
        spans = {"height": self.height, "width": self.width}
        latents = {name: int(getattr(span, end)) for name, span in spans.items() if span is not None}
        return {"batch": int(getattr(self, end))} | latents

    def check_latents(self, height: int, width: int) -> None:
        """Raises InputError where latents of that size are outside the profile."""
        if self.height is None or self.width is None:
            return
        if height not in self.height or width not in self.width:
            raise InputError(
                f"this engine takes latents of height {self.height} and width {self.width}, got {height}x{width}: "
                "build one for that size"
            )


def _span(data: Mapping[str, Any] | None) -> Span | None:
    return None if data is None else Span(data["minimum"], data["optimum"], data["maximum"], data["step"])


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
        return BuildOptions(**{**data, "profile": ShapeProfile.from_json(data["profile"])})
