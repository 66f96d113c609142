"""Time information precalculation (paper section 4.2): the way from timesteps to projected time features."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open

from s2p_deploy.errors import InputError
from s2p_deploy.families.kinds import kind_of, network_config
from s2p_deploy.numerics import INT8, fake_quantize, least_squares_weight_scale, max_scale
from s2p_deploy.records import TimeTable

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from torch import Tensor

    from s2p_deploy.families.base import BasePipeline
    from s2p_deploy.numerics import IntegerFormat

_WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors")


class TimePath(torch.nn.Module):
    """A network's way from timesteps to every consumer's projected time features: ``W_i SiLU(emb(t, c)) + b_i``.

    It shares the network's layers. ``slices`` names each consumer's columns of the result, in module order, end
    excluded. With ``quantized`` its linear layers are what quantized time layers compute: weights of that format with
    least-squares scales, inputs INT8 with one scale per layer, the maximum over all rows of a call.

    Raises:
        InputError: a consumer is of an unknown kind.
    """

    def __init__(self, network: torch.nn.Module, quantized: IntegerFormat | None = None) -> None:
        super().__init__()
        kind = kind_of(network)
        embedding = kind.embedding(network)
        self.embedding = embedding if quantized is None else _quantized_copy(embedding, quantized)
        self.consumers = torch.nn.ModuleList()
        self.slices: dict[str, tuple[int, int]] = {}
        start = 0
        for consumer in kind.consumers(network):
            linear = consumer.projection
            layer = linear if quantized is None else _QuantizedLinear(linear, quantized)
            self.consumers.append(torch.nn.Sequential(consumer.activation, layer))
            self.slices[consumer.path] = (start, start + linear.out_features)
            start = self.slices[consumer.path][1]

    def forward(self, timesteps: Tensor, added_cond: Tensor | None = None) -> Tensor:
        """Timesteps float32 [n], fractional ones included, and ``added_cond`` [n, A] where A is not 0, to [n, P].

        In the dtype of the weights.
        """
        embedding = self.embedding(timesteps, added_cond)
        return torch.cat([consumer(embedding) for consumer in self.consumers], 1)


@torch.no_grad()
def time_table_of(network: torch.nn.Module, rows: int, *, quantized: IntegerFormat | None = None) -> TimeTable | None:
    """What the time path of ``network`` gives for timesteps 0 to ``rows`` - 1, float32 [rows, P].

    None where the features depend on more than the timestep, so that there is no such table. With ``quantized`` the
    table is what quantized time layers would compute (for comparison: the paper's table is exact).
    """
    if kind_of(network).added_width(network_config(network)):
        return None
    path = TimePath(network, quantized)
    device = next(network.parameters()).device
    projections = path(torch.arange(rows, device=device, dtype=torch.float32))
    return TimeTable(projections.float().cpu().numpy().astype(np.float32), path.slices)


def load_time_path(base: BasePipeline) -> TimePath:
    """The time path of a pipeline's denoiser, float32 on the CPU; no other weight is read.

    Raises:
        InputError: a weight is missing, or as for :class:`TimePath`.
    """
    with torch.device("meta"):
        network = base.kind.build(base.denoiser_config())
        path = TimePath(network)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    wanted = {key: names[id(parameter)] for key, parameter in path.named_parameters()}
    tensors = _tensors(base.denoiser_folder, set(wanted.values()))
    missing = set(wanted.values()) - set(tensors)
    if missing:
        raise InputError(f"{base.denoiser_folder} lacks {min(missing)}: it is no whole pipeline")
    path.load_state_dict({key: tensors[name].float() for key, name in wanted.items()}, assign=True)
    return path.eval()


def _tensors(folder: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Those of a network's weights, from one file or from shards."""
    found: dict[str, Tensor] = {}
    for file in (file for pattern in _WEIGHT_FILES for file in sorted(folder.glob(pattern))):
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


def _quantized_copy(embedding: torch.nn.Module, fmt: IntegerFormat) -> torch.nn.Module:
    """An embedding with its layers quantized; the given one stays as it is."""
    result = copy.deepcopy(embedding)
    for path, layer in embedding.named_modules():
        if isinstance(layer, torch.nn.Linear):
            parent, _, leaf = path.rpartition(".")
            result.get_submodule(parent).register_module(leaf, _QuantizedLinear(layer, fmt))
    return result
