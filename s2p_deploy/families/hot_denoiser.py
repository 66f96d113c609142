"""The hot denoiser: diffusers' own UNet, its time path replaced by a table, called with rows instead of timesteps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.records import TimeTable


class HotDenoiser(torch.nn.Module):
    """What is trained, exported and timed. ``unet`` keeps diffusers' module paths: site names are relative to it."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, step_index: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """The network's raw output.

        Args:
            sample: [batch, C, H, W] latents after ``scale_model_input``.
            step_index: int64 [batch] row of each sample.
            encoder_hidden_states: [batch, tokens, D] text states.
        """
        result: Tensor = self.unet(sample, step_index, encoder_hidden_states, return_dict=False)[0]
        return result


def hot_denoiser_from_unet(unet: UNet2DConditionModel, table: TimeTable) -> HotDenoiser:
    """Replaces the time path of ``unet`` (in place) by ``table`` and wraps it. The time path's weights are gone."""
    dtype = next(unet.parameters()).dtype
    unet.time_proj = _TableRows(torch.from_numpy(table.projections).to(dtype))
    unet.time_embedding = _PassThrough()
    for name, (start, stop) in table.slices.items():
        resnet = unet.get_submodule(name)
        resnet.skip_time_act = True  # the table's features are already activated and projected
        resnet.time_emb_proj = _Columns(start, stop)
    return HotDenoiser(unet)


def set_time_table(hot: HotDenoiser, table: TimeTable) -> None:
    """Puts the values of another table of the same shape into ``hot``."""
    present = hot.unet.time_proj.table
    hot.unet.time_proj.table = torch.from_numpy(table.projections).to(present.device, present.dtype)


def new_hot_denoiser(config: dict[str, Any], table: TimeTable) -> HotDenoiser:
    """A hot denoiser with untrained weights from a diffusers configuration."""
    return hot_denoiser_from_unet(UNet2DConditionModel.from_config(config), table)


class _TableRows(torch.nn.Module):
    """Timesteps to rows of the table: int64 [batch] -> [batch, P]."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.embedding(rows, self.table)


class _PassThrough(torch.nn.Module):
    """Stands where the time embedding's MLP was; takes its unused condition too."""

    def forward(self, features: Tensor, _condition: Tensor | None = None) -> Tensor:
        return features


class _Columns(torch.nn.Module):
    """Stands where one resnet's projection was: its slice of the row."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, features: Tensor) -> Tensor:
        return features[:, self.start : self.stop]
