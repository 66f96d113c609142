"""ScaleTable: the timestep-indexed activation scales."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load, save_file

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True)
class ScaleTable:
    """Activation scales float32 [rows, points]; column ``i`` belongs to ``points[i]``.

    ``trained`` lists the rows that were calibrated; the others were interpolated (or held, beyond the ends).
    """

    scales: NDArray[np.float32]
    points: tuple[str, ...]
    trained: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.scales.dtype != np.float32 or self.scales.ndim != 2 or self.scales.shape[1] != len(self.points):
            raise InputError(
                f"a scale table must be float32 [rows, {len(self.points)}], got {self.scales.dtype} {self.scales.shape}"
            )
        bad = ~(np.isfinite(self.scales) & (self.scales > 0))
        if bad.any():
            row, column = (int(index[0]) for index in np.nonzero(bad))
            value = self.scales[row, column]
            raise InputError(
                f"scale table: {self.points[column]} at row {row} is {value}; scales must be finite and above zero"
            )

    @property
    def centres(self) -> NDArray[np.float32]:
        """The constant c of every column, float32 [points]: sqrt(min * max) over the rows."""
        if not len(self.points):
            return np.ones(0, np.float32)
        products: NDArray[np.float64] = self.scales.min(0).astype(np.float64) * self.scales.max(0)
        return np.sqrt(products).astype(np.float32)


def write_scale_table(table: ScaleTable, path: Path) -> None:
    """Writes ``act_scales.safetensors``."""
    tensors: dict[str, NDArray[Any]] = {
        "act_scales": table.scales,
        "trained": np.asarray(table.trained, dtype=np.int64),
    }
    save_file(tensors, path, metadata={"points": "\n".join(table.points)})


def read_scale_table(path: Path) -> ScaleTable:
    """Reads and checks ``act_scales.safetensors``.

    Raises:
        InputError: it is no scale table, or a scale is zero, negative, infinite or NaN.
    """
    try:
        return scale_table_from_bytes(path.read_bytes(), path)
    except OSError as error:
        raise InputError(f"{path} is no scale table") from error


def scale_table_from_bytes(data: bytes, path: Path) -> ScaleTable:
    """The same for the bytes of the file at ``path``."""
    from safetensors import SafetensorError

    try:
        tensors = load(data)  # checks the header, its length and every tensor's bounds
        scales, trained = tensors["act_scales"], tensors["trained"]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no scale table ({type(error).__name__})") from error
    if trained.dtype != np.int64 or trained.ndim != 1 or not ((trained >= 0) & (trained < len(scales))).all():
        raise InputError(f"{path} is no scale table: its trained rows must be int64 and within the table")
    names = header.get("__metadata__", {}).get("points", "")
    return ScaleTable(scales, tuple(names.split("\n")) if names else (), tuple(int(row) for row in trained))
