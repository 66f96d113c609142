"""Integer formats: symmetric, two's complement, with ONNX's limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class IntegerFormat:
    """A signed integer grid without zero point: codes ``qmin`` to ``qmax``."""

    name: str
    bits: int

    @property
    def qmin(self) -> int:
        """Smallest code, e.g. -128."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code, e.g. 127."""
        return (1 << (self.bits - 1)) - 1


INT8 = IntegerFormat("int8", 8)
INT4 = IntegerFormat("int4", 4)


def format_by_name(name: str) -> IntegerFormat | None:
    """The format that a recipe's word names; ``none`` means floating point (None).

    Raises:
        ValueError: the word is not one of int8, int4, none.
    """
    formats = {"int8": INT8, "int4": INT4, "none": None}
    if name not in formats:
        raise ValueError(f"unknown format {name!r}: use one of {', '.join(formats)}")
    return formats[name]
