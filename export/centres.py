"""The constants around which the lowerings scale, and whether every ratio to them can be represented."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from s2p_deploy.records import ScaleTable


def usable_centres(scales: ScaleTable, dtype: Literal["fp32", "fp16"]) -> dict[str, float]:
    """The constant c of every act point, rounded to ``dtype``.

    Ratios are taken against the rounded number: what Q and DQ divide and multiply by is what the ratios assume.

    Raises:
        InputError: c, or a ratio c/s or s/c of some row, is zero, subnormal or infinite in ``dtype``.
    """
    limits = np.finfo(np.float16 if dtype == "fp16" else np.float32)
    with np.errstate(over="ignore"):
        centres = scales.centres.astype(limits.dtype).astype(np.float32)
    for name, centre, column in zip(scales.points, centres, scales.scales.T, strict=True):
        ends = np.asarray([column.min(), column.max()], np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            numbers = np.concatenate([[centre], centre / ends, ends / centre])
        if not ((numbers >= limits.tiny) & (numbers <= limits.max)).all():
            raise InputError(
                f"act point {name}: its scales {ends[0]:g} to {ends[1]:g} leave the range of {dtype}: use --dtype fp32"
            )
    return {name: float(centre) for name, centre in zip(scales.points, centres, strict=True)}
