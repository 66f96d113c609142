"""Time information precalculation (paper section 4.2) for UNets whose time features depend on the timestep alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.numerics import INT8, fake_quantize, least_squares_weight_scale, max_scale
from s2p_deploy.records import TimeTable

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

    from s2p_deploy.numerics import IntegerFormat


@torch.no_grad()
def time_table_from_unet(
    unet: UNet2DConditionModel, rows: int, *, quantized: IntegerFormat | None = None
) -> TimeTable:
    """Every resnet's projected time features for timesteps 0 to ``rows`` - 1: ``W_i SiLU(MLP(emb(t))) + b_i``.

    Columns of all consumers stand side by side: float32 [rows, P] and a slice for each, in module order. With
    ``quantized`` the table is what quantized time layers would compute (for comparison: the paper's table is exact):
    weights of that format with least-squares scales, inputs INT8 with one scale per layer, the maximum over all rows.

    Raises:
        InputError: the time features depend on more than the timestep (SDXL kinds).
    """
    if unet.config.addition_embed_type is not None or unet.config.class_embed_type is not None:
        raise InputError("this denoiser's time features depend on the prompt too (SDXL kind): not supported yet")
    weight = next(unet.time_embedding.parameters())
    features = unet.time_proj(torch.arange(rows, device=weight.device)).to(weight.dtype)
    embedding = _mlp(unet.time_embedding, quantized)(features)
    columns, slices, start = [], {}, 0
    for name, module in unet.named_modules():
        projection = getattr(module, "time_emb_proj", None)
        if projection is None:
            continue
        if module.time_embedding_norm != "default":
            raise InputError(
                f"{name} uses time_embedding_norm={module.time_embedding_norm!r}: only 'default' is supported"
            )
        columns.append(_layer(projection, quantized)(module.nonlinearity(embedding)))
        slices[name] = (start, start + columns[-1].shape[1])
        start = slices[name][1]
    return TimeTable(torch.cat(columns, 1).float().cpu().numpy().astype(np.float32), slices)


class _QuantizedLinear(torch.nn.Module):
    """A linear layer with its weight on a grid, and its input, all rows at once, on INT8's under their maximum."""

    def __init__(self, linear: torch.nn.Linear, fmt: IntegerFormat) -> None:
        super().__init__()
        self.weight = fake_quantize(linear.weight, least_squares_weight_scale(linear.weight, fmt), fmt)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        on_grid = fake_quantize(x, max_scale(x, INT8), INT8)
        return torch.nn.functional.linear(on_grid, self.weight, self.bias)


def _layer(linear: torch.nn.Linear, quantized: IntegerFormat | None) -> torch.nn.Module:
    return linear if quantized is None else _QuantizedLinear(linear, quantized)


def _mlp(embedding: torch.nn.Module, quantized: IntegerFormat | None) -> torch.nn.Module:
    """The time embedding with its layers quantized, in a copy; the given one stays as it is."""
    if quantized is None:
        return embedding
    result = copy.deepcopy(embedding)
    for name, child in embedding.named_children():
        if isinstance(child, torch.nn.Linear):
            result.register_module(name, _QuantizedLinear(child, quantized))
    return result
