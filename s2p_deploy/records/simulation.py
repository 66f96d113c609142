"""Simulation: parts of an activation grid that no engine has, for comparisons in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file, save_file

from s2p_deploy.records.strict import reading_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Simulation:
    """``offsets`` float32 [rows, points]: values of code 0 (asymmetric activations); ``relaxed`` rows have 10 bits."""

    offsets: NDArray[np.float32]
    relaxed: tuple[int, ...]


def write_simulation(simulation: Simulation, path: Path) -> None:
    """Writes ``simulation.safetensors``."""
    save_file({"offsets": simulation.offsets, "relaxed": np.asarray(simulation.relaxed, np.int64)}, path)


def read_simulation(path: Path) -> Simulation | None:
    """Reads ``simulation.safetensors``; None where there is none."""
    if not path.exists():
        return None
    with reading_tensors(path):
        tensors = load_file(path)
        return Simulation(tensors["offsets"], tuple(int(row) for row in tensors["relaxed"]))
