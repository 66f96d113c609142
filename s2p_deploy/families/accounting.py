"""Where every weight of a checkpoint goes: nothing is dropped without a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from s2p_deploy.families.hot_denoiser import hot_skeleton
from s2p_deploy.families.kinds import kind_of_config
from s2p_deploy.families.time_path import TimePath
from s2p_deploy.records import TimestepTable, TimeTable

if TYPE_CHECKING:
    from s2p_deploy.families.network_kind import Config

Place = Literal["denoiser", "conditioning", "time table"]


def weight_places(config: Config) -> dict[str, Place]:
    """The place of every tensor of a network's checkpoint, by its name, from the configuration alone.

    ``denoiser``: in the hot graph. ``conditioning``: in the graph that computes the projected time features, once per
    prompt. ``time table``: gone, because the features of every timestep are precalculated (paper, section 4.2).

    Raises:
        InputError: the configuration is of no supported network.
    """
    kind = kind_of_config(config)
    with torch.device("meta"):
        network = kind.build(config)
        names = list(network.state_dict())
        slices = TimePath(network).slices
    places: dict[str, Place] = dict.fromkeys(names, "time table")
    for name, source in hot_skeleton(config, _rows(config, slices)).sources.items():
        places[source] = "conditioning" if name.startswith("time.") else "denoiser"
    return places


def _rows(config: Config, slices: dict[str, tuple[int, int]]) -> TimeTable | TimestepTable:
    """Any rows of the right kind: the weights' places do not depend on them."""
    if kind_of_config(config).added_width(config):
        return TimestepTable("none", {}, 1, (0,), np.zeros(1))
    return TimeTable(np.zeros((1, max(stop for _, stop in slices.values())), np.float32), slices)
