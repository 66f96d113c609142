"""Time information precalculation (paper section 4.2) for UNets whose time features depend on the timestep alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.records import TimeTable

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


@torch.no_grad()
def time_table_from_unet(unet: UNet2DConditionModel, rows: int) -> TimeTable:
    """Every resnet's projected time features for timesteps 0 to ``rows`` - 1: ``W_i SiLU(MLP(emb(t))) + b_i``.

    Columns of all consumers stand side by side: float32 [rows, P] and a slice for each, in module order.

    Raises:
        InputError: the time features depend on more than the timestep (SDXL kinds).
    """
    if unet.config.addition_embed_type is not None or unet.config.class_embed_type is not None:
        raise InputError("this denoiser's time features depend on the prompt too (SDXL kind): not supported yet")
    weight = next(unet.time_embedding.parameters())
    features = unet.time_proj(torch.arange(rows, device=weight.device)).to(weight.dtype)
    embedding = unet.time_embedding(features)
    columns, slices, start = [], {}, 0
    for name, module in unet.named_modules():
        projection = getattr(module, "time_emb_proj", None)
        if projection is None:
            continue
        if module.time_embedding_norm != "default":
            raise InputError(
                f"{name} uses time_embedding_norm={module.time_embedding_norm!r}: only 'default' is supported"
            )
        columns.append(projection(module.nonlinearity(embedding)))
        slices[name] = (start, start + columns[-1].shape[1])
        start = slices[name][1]
    return TimeTable(torch.cat(columns, 1).float().numpy().astype(np.float32), slices)
