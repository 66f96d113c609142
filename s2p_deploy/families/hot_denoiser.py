"""The hot denoiser: diffusers' own network without its time path, called with rows instead of timesteps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from s2p_deploy.families.kinds import kind_of, kind_of_config, network_config
from s2p_deploy.families.pipelines import denoiser_of
from s2p_deploy.families.time_features import GivenFeatures, PathRows, TableRows
from s2p_deploy.families.time_path import TimePath, time_table_of
from s2p_deploy.records import TimestepTable, TimeTable
from s2p_deploy.timesteps import timestep_table_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from torch import Tensor

    from s2p_deploy.families.network_kind import Config


class HotDenoiser(torch.nn.Module):
    """What is trained, exported and timed.

    ``network`` keeps diffusers' module paths: site names are relative to it. ``time`` gives a row's projected time
    features. ``config`` is the network's as it was, with its time path; ``added_width`` that of ``added_cond``.
    """

    network: ModelMixin

    def __init__(self, network: ModelMixin, time: torch.nn.Module, config: Config) -> None:
        super().__init__()
        self.network, self.time, self.config = network, time, config
        self.kind = kind_of_config(config)
        self.added_width = self.kind.added_width(config)

    def forward(
        self, sample: Tensor, step_index: Tensor, encoder_hidden_states: Tensor, added_cond: Tensor | None = None
    ) -> Tensor:
        """The network's raw output.

        Args:
            sample: [batch, C, H, W] latents after ``scale_model_input``.
            step_index: int64 [batch] row of each sample.
            encoder_hidden_states: [batch, tokens, D] text states.
            added_cond: [batch, A] what the time features depend on besides the row; not read where A is 0.
        """
        features = self.time(step_index, added_cond)
        return self.kind.denoise(self.network, sample, features, encoder_hidden_states)


@dataclass(frozen=True)
class Skeleton:
    """A hot denoiser on the meta device.

    ``sources``: the name in the pipeline's checkpoint of every tensor in the hot denoiser's state.
    """

    hot: HotDenoiser
    sources: dict[str, str]


def hot_denoiser(network: ModelMixin, time: TimeTable | TimestepTable) -> HotDenoiser:
    """Takes the time path out of ``network`` (in place) and wraps it.

    A table of features stands in the time path's place, whose weights are gone; with a table of timesteps the time
    path stays, beside the network, and gives the features of the timesteps.
    """
    kind, config = kind_of(network), network_config(network)
    kind.check(config)
    if isinstance(time, TimeTable):
        kind.release_time_path(network, time.slices)
        return HotDenoiser(network, TableRows(time, next(network.parameters()).dtype), config)
    path = TimePath(network)
    kind.release_time_path(network, path.slices)
    return HotDenoiser(network, PathRows(path, time.timesteps), config)


def hot_denoiser_of(pipe: DiffusionPipeline, steps: int) -> HotDenoiser:
    """The denoiser of a pipeline (changed in place) with the rows of ``steps`` of the pipeline's own scheduler.

    Raises:
        InputError: the scheduler has no such schedule.
    """
    network = denoiser_of(pipe)
    conditioned = bool(kind_of(network).added_width(network_config(network)))
    timesteps = timestep_table_of(pipe.scheduler, steps, fractional=conditioned)
    return hot_denoiser(network, time_table_of(network, len(timesteps.angle)) or timesteps)


def new_hot_denoiser(config: Config, time: TimeTable | TimestepTable) -> HotDenoiser:
    """A hot denoiser with untrained weights from a diffusers configuration."""
    return hot_denoiser(kind_of_config(config).build(config), time)


def hot_skeleton(config: Config, time: TimeTable | TimestepTable) -> Skeleton:
    """A hot denoiser of a configuration on the meta device, and where its weights come from."""
    with torch.device("meta"):
        network = kind_of_config(config).build(config)
        names = {id(tensor): name for name, tensor in network.state_dict(keep_vars=True).items()}
        hot = hot_denoiser(network, time)
        sources = {name: names[id(tensor)] for name, tensor in hot.state_dict(keep_vars=True).items()}
    return Skeleton(hot.to(device="meta"), sources)


def given_features(hot: HotDenoiser) -> HotDenoiser:
    """The same network called with projected features [batch, P] in the place of ``added_cond``."""
    return HotDenoiser(hot.network, GivenFeatures(), hot.config)


def set_time_table(hot: HotDenoiser, table: TimeTable) -> None:
    """Puts the values of another table of the same shape into ``hot``."""
    assert isinstance(hot.time, TableRows), "its features come from a table"
    present = hot.time.table
    hot.time.table = torch.from_numpy(table.projections).to(present.device, present.dtype)
