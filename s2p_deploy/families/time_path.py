"""The time path: a network's way from timesteps to projected time features, and its precalculation (paper 4.2).

An indexed denoiser takes the features from one of three modules: a constant table (:class:`FeatureTable`), the time
path itself (:class:`IndexedTimePath`), or the caller (:class:`GivenFeatures`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from s2p_deploy.families.checkpoint import Checkpoint
from s2p_deploy.families.registry import family_of, network_config
from s2p_deploy.records import TimeTable

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.families.pipelines import BasePipeline


class TimePath(nn.Module):
    """The way from timesteps to every consumer's projected time features: ``W_i SiLU(emb(t, c)) + b_i``.

    Args:
        network: a whole network, whose layers it shares.

    Attributes:
        slices: each consumer's columns of the features by its path, in module order, end excluded.

    Raises:
        InputError: a consumer is of an unknown kind.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        family = family_of(network)
        self.embedding = family.embedding(network)
        self.consumers = nn.ModuleList()
        self.slices: dict[str, tuple[int, int]] = {}
        start = 0
        for consumer in family.consumers(network):
            self.consumers.append(nn.Sequential(consumer.activation, consumer.projection))
            self.slices[consumer.path] = (start, start + consumer.projection.out_features)
            start = self.slices[consumer.path][1]

    def forward(self, timesteps: Tensor, added_cond: Tensor | None = None) -> Tensor:
        """Computes the features [n, P], in the dtype of the weights.

        Args:
            timesteps: float32 [n], fractional ones included.
            added_cond: [n, A]; not read where A is 0.
        """
        embedding = self.embedding(timesteps, added_cond)
        return torch.cat([consumer(embedding) for consumer in self.consumers], 1)


class FeatureTable(nn.Module):
    """Features by timestep index from a constant table."""

    table: Tensor

    def __init__(self, table: TimeTable, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("table", torch.from_numpy(table.projections).to(dtype), persistent=False)

    def forward(self, timestep_index: Tensor, _added_cond: Tensor | None = None) -> Tensor:
        """Looks up the features [batch, P] of ``timestep_index`` int64 [batch]."""
        return nn.functional.embedding(timestep_index, self.table)


class IndexedTimePath(nn.Module):
    """Features by timestep index, computed by the time path; its weights are not trained."""

    timesteps: Tensor

    def __init__(self, path: TimePath, timesteps: NDArray[np.float64]) -> None:
        super().__init__()
        self.path = path.requires_grad_(requires_grad=False)
        self.register_buffer("timesteps", torch.from_numpy(timesteps).float(), persistent=False)

    def forward(self, timestep_index: Tensor, added_cond: Tensor | None = None) -> Tensor:
        """Computes the features [batch, P] of ``timestep_index`` int64 [batch] and ``added_cond`` [batch, A]."""
        features: Tensor = self.path(self.timesteps[timestep_index], added_cond)
        return features


class GivenFeatures(nn.Module):
    """Features that the caller passes in place of ``added_cond``: the exported form."""

    def forward(self, _timestep_index: Tensor, features: Tensor) -> Tensor:
        """Returns ``features`` [batch, P] unchanged."""
        return features


@torch.no_grad()
def time_table_of(network: nn.Module, timesteps: int) -> TimeTable | None:
    """Computes the projected time features of ``network``, float32 [timesteps, P], for timesteps from 0 on.

    None where the features depend on more than the timestep, so that there is no such table.
    """
    if family_of(network).added_width(network_config(network)):
        return None
    return table_of_path(TimePath(network), timesteps)


@torch.no_grad()
def table_of_path(path: TimePath, timesteps: int) -> TimeTable:
    """Computes the features, float32 [timesteps, P], of a time path for timesteps from 0 on."""
    device = next(path.parameters()).device
    projections = path(torch.arange(timesteps, device=device, dtype=torch.float32))
    return TimeTable(projections.float().cpu().numpy().astype(np.float32), path.slices)


def load_time_path(base: BasePipeline) -> TimePath:
    """Loads the time path of a pipeline's denoiser, float32 on the CPU; no other weight is read.

    Raises:
        InputError: a weight is missing, or as for :class:`TimePath`.
    """
    with torch.device("meta"):
        network = base.family.build(base.denoiser_config())
        path = TimePath(network)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    wanted = {key: names[id(parameter)] for key, parameter in path.named_parameters()}
    checkpoint = Checkpoint(base.denoiser_folder)
    path.load_state_dict({key: checkpoint.read(name).float() for key, name in wanted.items()}, assign=True)
    return path.eval()
