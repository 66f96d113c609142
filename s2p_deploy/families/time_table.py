"""Time information precalculation (paper section 4.2) for UNets whose time features depend on the timestep alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from s2p_deploy.errors import InputError
from s2p_deploy.numerics import INT8, fake_quantize, least_squares_weight_scale, max_scale
from s2p_deploy.records import TimeTable

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from s2p_deploy.families.base import BasePipeline
    from s2p_deploy.numerics import IntegerFormat

_WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors")


class TimePath(torch.nn.Module):
    """A UNet's way from timesteps to every resnet's projected time features: ``W_i SiLU(MLP(emb(t))) + b_i``.

    It shares the UNet's layers. ``slices`` names each consumer's columns of the result, in module order, end excluded.
    With ``quantized`` its layers are what quantized time layers compute: weights of that format with least-squares
    scales, inputs INT8 with one scale per layer, the maximum over all rows of a call.

    Raises:
        InputError: the time features depend on more than the timestep (SDXL kinds), or are not simply added.
    """

    def __init__(self, unet: UNet2DConditionModel, quantized: IntegerFormat | None = None) -> None:
        super().__init__()
        if unet.config.addition_embed_type is not None or unet.config.class_embed_type is not None:
            raise InputError("this denoiser's time features depend on the prompt too (SDXL kind): not supported yet")
        self.features = unet.time_proj
        self.embedding = _mlp(unet.time_embedding, quantized)
        self.consumers = torch.nn.ModuleList()
        self.slices: dict[str, tuple[int, int]] = {}
        start = 0
        for name, module in unet.named_modules():
            projection = getattr(module, "time_emb_proj", None)
            if projection is None:
                continue
            if module.time_embedding_norm != "default":
                raise InputError(
                    f"{name} uses time_embedding_norm={module.time_embedding_norm!r}: only 'default' is supported"
                )
            self.consumers.append(torch.nn.Sequential(module.nonlinearity, _layer(projection, quantized)))
            self.slices[name] = (start, start + projection.out_features)
            start = self.slices[name][1]

    def forward(self, timesteps: Tensor) -> Tensor:
        """Timesteps float32 [rows], fractional ones included, to [rows, P] in the dtype of the weights."""
        dtype = next(self.embedding.parameters()).dtype
        embedding = self.embedding(self.features(timesteps).to(dtype))
        return torch.cat([consumer(embedding) for consumer in self.consumers], 1)


@torch.no_grad()
def time_table_from_unet(
    unet: UNet2DConditionModel, rows: int, *, quantized: IntegerFormat | None = None
) -> TimeTable:
    """What the time path of ``unet`` gives for timesteps 0 to ``rows`` - 1, float32 [rows, P].

    With ``quantized`` the table is what quantized time layers would compute (for comparison: the paper's table is
    exact). Raises InputError as :class:`TimePath` does.
    """
    path = TimePath(unet, quantized)
    device = next(unet.time_embedding.parameters()).device
    projections = path(torch.arange(rows, device=device, dtype=torch.float32))
    return TimeTable(projections.float().cpu().numpy().astype(np.float32), path.slices)


def load_time_path(base: BasePipeline) -> TimePath:
    """The time path of a pipeline's UNet, float32 on the CPU; no other weight is read.

    Raises:
        InputError: a weight is missing, or as for :class:`TimePath`.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base.folder / "unet"))
        path = TimePath(unet)
    names = {id(parameter): name for name, parameter in unet.named_parameters()}
    wanted = {key: names[id(parameter)] for key, parameter in path.named_parameters()}
    tensors = _tensors(base, set(wanted.values()))
    missing = set(wanted.values()) - set(tensors)
    if missing:
        raise InputError(f"{base.folder / 'unet'} lacks {min(missing)}: it is no whole pipeline")
    path.load_state_dict({key: tensors[name].float() for key, name in wanted.items()}, assign=True)
    return path.eval()


def _tensors(base: BasePipeline, names: Collection[str]) -> dict[str, Tensor]:
    """Those of the UNet's weights, from one file or from shards."""
    found: dict[str, Tensor] = {}
    for file in (file for pattern in _WEIGHT_FILES for file in sorted((base.folder / "unet").glob(pattern))):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys() if name in names}  # noqa: SIM118 - no dictionary
    return found


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
