"""The indexed denoiser: diffusers' own network without its time path, called with timestep indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from s2p_deploy.families.model_family import Columns
from s2p_deploy.families.pipelines import denoiser_of
from s2p_deploy.families.registry import family_of, family_of_config, network_config
from s2p_deploy.families.time_path import FeatureTable, GivenFeatures, IndexedTimePath, TimePath, time_table_of
from s2p_deploy.records import TimestepTable, TimeTable
from s2p_deploy.timesteps import timestep_table_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline, ModelMixin
    from torch import Tensor

    from s2p_deploy.families.model_family import Config

WeightDestination = Literal["denoiser", "conditioning", "time table"]


class IndexedDenoiser(torch.nn.Module):
    """The network that is trained, exported and timed.

    Attributes:
        network: diffusers' network without its time path. Its module paths are diffusers': layer names are relative
            to it.
        time: maps timestep indices to projected time features.
        config: the network's configuration as it was, with its time path.
        family: the network's family.
        added_width: A of ``added_cond``.
    """

    network: ModelMixin

    def __init__(self, network: ModelMixin, time: torch.nn.Module, config: Config) -> None:
        super().__init__()
        self.network, self.time, self.config = network, time, config
        self.family = family_of_config(config)
        self.added_width = self.family.added_width(config)

    @property
    def device(self) -> torch.device:
        """Returns the device of the weights. diffusers' own ``network.device`` takes milliseconds to find it."""
        device: torch.device = next(self.network.parameters()).device
        return device

    def forward(
        self,
        sample: Tensor,
        timestep_index: Tensor,
        encoder_hidden_states: Tensor,
        added_cond: Tensor | None = None,
        optional: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Predicts the network's raw output [batch, C, H, W].

        Args:
            sample: [batch, C, H, W] latents after ``scale_model_input``.
            timestep_index: int64 [batch]; samples of one batch may differ.
            encoder_hidden_states: [batch, tokens, D] text states.
            added_cond: [batch, A] conditions of the time features besides the timestep; not read where A is 0.
            optional: inputs of adapters by name, such as a ControlNet's residuals, in their order.
        """
        features = self.time(timestep_index, added_cond)
        return self.family.predict_from_features(self.network, sample, features, encoder_hidden_states, optional or {})

    def time_slices(self) -> dict[str, tuple[int, int]]:
        """Returns each consumer's columns of the projected features, by path, in module order."""
        modules = self.network.named_modules()
        columns = ((path, module) for path, module in modules if isinstance(module, Columns))
        return {path.rpartition(".")[0]: (module.start, module.stop) for path, module in columns}

    def with_given_features(self) -> IndexedDenoiser:
        """Returns a denoiser of the same network that takes projected features [batch, P] as its ``added_cond``."""
        return IndexedDenoiser(self.network, GivenFeatures(), self.config)

    def set_time_table(self, table: TimeTable) -> None:
        """Replaces the values of the denoiser's constant table by those of another of the same shape."""
        assert isinstance(self.time, FeatureTable), "its features come from a table"
        present = self.time.table
        self.time.table = torch.from_numpy(table.projections).to(present.device, present.dtype)


@dataclass(frozen=True)
class Skeleton:
    """An indexed denoiser on the meta device.

    ``sources`` maps every tensor in the denoiser's state to its name in the pipeline's checkpoint.
    """

    denoiser: IndexedDenoiser
    sources: dict[str, str]


def indexed_denoiser(network: ModelMixin, time: TimeTable | TimestepTable) -> IndexedDenoiser:
    """Removes the time path from ``network`` (in place) and wraps it.

    With a table of features the weights of the time path are gone; with a table of timesteps the time path stays,
    beside the network, and computes the features of the timesteps.

    Raises:
        InputError: an engine cannot compute such a network.
    """
    family, config = family_of(network), network_config(network)
    family.check(config)
    if isinstance(time, TimeTable):
        family.remove_time_path(network, time.slices)
        return IndexedDenoiser(network, FeatureTable(time, next(network.parameters()).dtype), config)
    path = TimePath(network)
    family.remove_time_path(network, path.slices)
    return IndexedDenoiser(network, IndexedTimePath(path, time.timesteps), config)


def indexed_denoiser_of(pipe: DiffusionPipeline, steps: int) -> IndexedDenoiser:
    """Makes the indexed denoiser of a pipeline (changed in place), with ``steps`` of the pipeline's own scheduler.

    Raises:
        InputError: the scheduler has no such schedule.
    """
    network = denoiser_of(pipe)
    conditioned = bool(family_of(network).added_width(network_config(network)))
    timesteps = timestep_table_of(pipe.scheduler, steps, fractional=conditioned)
    return indexed_denoiser(network, time_table_of(network, len(timesteps.angle)) or timesteps)


def new_indexed_denoiser(config: Config, time: TimeTable | TimestepTable) -> IndexedDenoiser:
    """Makes an indexed denoiser with untrained weights from a diffusers configuration."""
    return indexed_denoiser(family_of_config(config).build(config), time)


def indexed_skeleton(config: Config, time: TimeTable | TimestepTable) -> Skeleton:
    """Makes an indexed denoiser of a configuration on the meta device, and finds where its weights come from."""
    with torch.device("meta"):
        network = family_of_config(config).build(config)
        names = {id(tensor): name for name, tensor in network.state_dict(keep_vars=True).items()}
        denoiser = indexed_denoiser(network, time)
        sources = {name: names[id(tensor)] for name, tensor in denoiser.state_dict(keep_vars=True).items()}
    return Skeleton(denoiser.to(device="meta"), sources)


def weight_destinations(config: Config) -> dict[str, WeightDestination]:
    """Finds the destination of every tensor of a network's checkpoint, by its name, from the configuration alone.

    ``denoiser``: in the denoiser graph. ``conditioning``: in the graph that computes the projected time features, once
    per prompt. ``time table``: nowhere, because the features of every timestep are precalculated (paper, section 4.2).

    Raises:
        InputError: the network is not supported.
    """
    family = family_of_config(config)
    with torch.device("meta"):
        network = family.build(config)
        names = list(network.state_dict())
        slices = TimePath(network).slices
    # any table of the right kind: the destinations do not depend on its values
    time: TimeTable | TimestepTable = TimestepTable("none", {}, 1, (0,), np.zeros(1))
    if not family.added_width(config):
        time = TimeTable(np.zeros((1, max(stop for _, stop in slices.values())), np.float32), slices)
    destinations: dict[str, WeightDestination] = dict.fromkeys(names, "time table")
    for name, source in indexed_skeleton(config, time).sources.items():
        destinations[source] = "conditioning" if name.startswith("time.") else "denoiser"
    return destinations
