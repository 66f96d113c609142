"""Integer formats without zero point, with ONNX's limits."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class IntegerFormat:
    """A signed integer grid without zero point: codes ``qmin`` to ``qmax``."""

    name: str
    qmin: int
    qmax: int

    @property
    def levels(self) -> int:
        """Number of codes."""
        return self.qmax - self.qmin + 1

    @property
    def bits(self) -> float:
        """Information of one code, log2(levels)."""
        return math.log2(self.levels)


INT8 = IntegerFormat("int8", -128, 127)
INT4 = IntegerFormat("int4", -8, 7)

_FORMATS = {fmt.name: fmt for fmt in (INT8, INT4)}


def format_by_name(name: str) -> IntegerFormat | None:
    """Returns the integer format of a name; ``none`` means floating point (None).

    Raises:
        ValueError: there is no format of that name.
    """
    if name == "none":
        return None
    if name not in _FORMATS:
        raise ValueError(f"unknown format {name!r}: use one of {', '.join(_FORMATS)}, none")
    return _FORMATS[name]
