"""The time table of a pipeline without precalculation: from time layers that are quantized like the rest."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from s2p_deploy.errors import InputError
from s2p_deploy.families import family_of
from s2p_deploy.families.registry import network_config
from s2p_deploy.families.time_path import TimePath, table_of_path
from s2p_deploy.numerics import INT8, fake_quantize, least_squares_weight_scale, max_scale

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.numerics import IntegerFormat
    from s2p_deploy.records import TimeTable


@torch.no_grad()
def quantized_time_table(network: torch.nn.Module, timesteps: int, fmt: IntegerFormat) -> TimeTable:
    """Computes the features of the timesteps 0 to ``timesteps`` - 1 by quantized time layers, float32 [timesteps, P].

    Weights of ``fmt`` with least-squares scales; inputs INT8 with one scale per layer, the maximum over all timesteps.

    Raises:
        InputError: the features depend on the prompt too.
    """
    if family_of(network).added_width(network_config(network)):
        raise InputError("transforms.time_layers: quantized needs a constant time table, this model has none")
    path = TimePath(network)
    path.embedding = _quantized_copy(path.embedding, fmt)
    path.consumers = torch.nn.ModuleList(
        torch.nn.Sequential(activation, _QuantizedLinear(projection, fmt))
        for activation, projection in (consumer.children() for consumer in path.consumers)
        if isinstance(projection, torch.nn.Linear)
    )
    return table_of_path(path, timesteps)


class _QuantizedLinear(torch.nn.Module):
    """A linear layer with its weight on a grid, and its input, all timesteps at once, on INT8's under their maximum."""

    def __init__(self, linear: torch.nn.Linear, fmt: IntegerFormat) -> None:
        super().__init__()
        self.weight = fake_quantize(linear.weight, least_squares_weight_scale(linear.weight, fmt), fmt)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        on_grid = fake_quantize(x, max_scale(x, INT8), INT8)
        return torch.nn.functional.linear(on_grid, self.weight, self.bias)


def _quantized_copy(embedding: torch.nn.Module, fmt: IntegerFormat) -> torch.nn.Module:
    """Copies an embedding with its layers quantized."""
    result = copy.deepcopy(embedding)
    for path, layer in embedding.named_modules():
        if isinstance(layer, torch.nn.Linear):
            parent, _, leaf = path.rpartition(".")
            result.get_submodule(parent).register_module(leaf, _QuantizedLinear(layer, fmt))
    return result
