"""Codes of few levels, several to a byte: 5 of 3 levels, 3 of 5, 2 of 9 or of 16 (INT4)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from s2p_deploy.numerics import IntegerFormat


def codes_per_byte(fmt: IntegerFormat) -> int:
    """Counts how many codes fit into one byte as digits of base ``fmt.levels``; 0 where not even one does."""
    return int(8 / fmt.bits)


def pack_codes(codes: Tensor, fmt: IntegerFormat) -> Tensor:
    """Packs codes of any shape to uint8 [ceil(n / codes_per_byte)], in order; a byte's first code is its lowest digit.

    Raises:
        ValueError: a code is outside the format, or the format has more than 256 levels.
    """
    powers = _powers(fmt)
    digits = codes.detach().flatten().to(torch.int32) - fmt.qmin
    if digits.numel() and (int(digits.min()) < 0 or int(digits.max()) >= fmt.levels):
        raise ValueError(f"codes are outside {fmt.qmin} to {fmt.qmax} of {fmt.name}")
    padded = torch.nn.functional.pad(digits, (0, -len(digits) % len(powers)))
    return (padded.view(-1, len(powers)) * powers).sum(1).to(torch.uint8)


def unpack_codes(packed: Tensor, fmt: IntegerFormat, shape: Sequence[int]) -> Tensor:
    """Unpacks bytes of :func:`pack_codes` to int8 codes of ``shape``.

    Raises:
        ValueError: there are not as many bytes as the shape needs, or a byte is none that the format has.
    """
    powers = _powers(fmt)
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-count // len(powers)),):
        raise ValueError(f"{count} codes of {fmt.name} are not {packed.dtype} {tuple(packed.shape)}")
    if packed.numel() and int(packed.max()) >= fmt.levels ** len(powers):
        raise ValueError(f"byte {int(packed.max())} holds no codes of {fmt.name}")
    digits = packed.to(torch.int32).unsqueeze(1) // powers % fmt.levels
    return (digits.flatten()[:count] + fmt.qmin).to(torch.int8).view(tuple(shape))


def _powers(fmt: IntegerFormat) -> Tensor:
    """Weights int32 [codes_per_byte] of the digits, lowest first."""
    count = codes_per_byte(fmt)
    if not count:
        raise ValueError(f"{fmt.name} has {fmt.levels} levels: a byte holds 256")
    return fmt.levels ** torch.arange(count, dtype=torch.int32)
