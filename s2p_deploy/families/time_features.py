"""Where a hot denoiser's projected time features come from: a table, the time path itself, or the caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.families.hot_denoiser import HotDenoiser
    from s2p_deploy.families.time_path import TimePath
    from s2p_deploy.records import TimeTable


class TableRows(torch.nn.Module):
    """Features of a row from a constant table."""

    table: Tensor

    def __init__(self, table: TimeTable, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("table", torch.from_numpy(table.projections).to(dtype), persistent=False)

    def forward(self, step_index: Tensor, _added_cond: Tensor | None = None) -> Tensor:
        """Rows int64 [batch] to [batch, P]."""
        return torch.nn.functional.embedding(step_index, self.table)


class PathRows(torch.nn.Module):
    """Features of a row computed by the time path, from the row's timestep and what else they depend on.

    The path's weights are not trained.
    """

    timesteps: Tensor

    def __init__(self, path: TimePath, timesteps: NDArray[np.float64]) -> None:
        super().__init__()
        self.path = path.requires_grad_(requires_grad=False)
        self.register_buffer("timesteps", torch.from_numpy(timesteps).float(), persistent=False)

    def forward(self, step_index: Tensor, added_cond: Tensor | None = None) -> Tensor:
        """Rows int64 [batch] and ``added_cond`` [batch, A] to [batch, P]."""
        features: Tensor = self.path(self.timesteps[step_index], added_cond)
        return features


class GivenFeatures(torch.nn.Module):
    """Features that the caller brings, in the place of what they depend on: the exported form."""

    def forward(self, _step_index: Tensor, features: Tensor) -> Tensor:
        """[batch, P] as they are."""
        return features


def time_slices(hot: HotDenoiser) -> dict[str, tuple[int, int]]:
    """Each consumer's columns of the projected features, by path, in module order."""
    modules = hot.network.named_modules()
    found = ((path, module) for path, module in modules if isinstance(module, Columns))
    return {path.rpartition(".")[0]: (module.start, module.stop) for path, module in found}


class Columns(torch.nn.Module):
    """Stands where one consumer's projection was: its slice of the features."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, features: Tensor) -> Tensor:
        """[batch, P] to [batch, stop - start]."""
        return features[:, self.start : self.stop]
