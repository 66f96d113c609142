"""TransformSpec: how a calibrated denoiser's modules differ from the pipeline's own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class TransformSpec:
    """Rewrites of module paths, applied in this order; all are exact in floating point.

    ``split`` maps a convolution to the number of its leading input channels: it becomes ``<path>.head`` and
    ``<path>.skip``. ``smoothed`` are linears that became ``<path>.layer`` behind a division by ``<path>.factor``.
    ``low_rank`` maps a linear (``.layer`` where it was smoothed) to the rank of the branch ``<path>.down``,
    ``<path>.up`` beside ``<path>.residual``.
    """

    split: dict[str, int] = field(default_factory=dict)
    smoothed: tuple[str, ...] = ()
    low_rank: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self) | {"smoothed": list(self.smoothed)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> TransformSpec:
        """Inverse of :meth:`to_json`."""
        return TransformSpec(dict(data["split"]), tuple(data["smoothed"]), dict(data["low_rank"]))
