"""Integer formats: symmetric around zero; int4 and int8 have ONNX's limits, the balanced ones an odd level count."""

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
        """Information of one code, e.g. 8 for int8 and 1.585 for three levels."""
        return math.log2(self.levels)


def _twos_complement(bits: int) -> IntegerFormat:
    return IntegerFormat(f"int{bits}", -(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _balanced(levels: int) -> IntegerFormat:
    return IntegerFormat(f"levels{levels}", -(levels // 2), levels // 2)


INT8 = _twos_complement(8)
INT4 = _twos_complement(4)
INT10 = _twos_complement(10)  # PCR's relaxed activations (arXiv 2311.06322): in simulation only
# BitsFusion's balanced integers for "1, 2 and 3 bits" (arXiv 2406.04333): 2^n + 1 levels, zero in the middle.
LEVELS3, LEVELS5, LEVELS9 = (_balanced(levels) for levels in (3, 5, 9))

_FORMATS = {fmt.name: fmt for fmt in (INT8, INT4, INT10, LEVELS3, LEVELS5, LEVELS9)}


def format_by_name(name: str) -> IntegerFormat | None:
    """The format that a recipe's word names; ``none`` means floating point (None).

    Raises:
        ValueError: there is no format of that name.
    """
    if name == "none":
        return None
    if name not in _FORMATS:
        raise ValueError(f"unknown format {name!r}: use one of {', '.join(_FORMATS)}, none")
    return _FORMATS[name]
