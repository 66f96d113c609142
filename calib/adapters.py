"""Low-rank updates in place of the weights (EfficientDM, arXiv 2310.03270): Q(W + B A), merged before quantizing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from s2p_deploy.calib.quantized_denoiser import WeightQuantizer

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.calib.training_state import TrainingState


class AdaptedWeightQuantizer(WeightQuantizer):
    """A weight quantizer that adds an update first: ``up`` [out, rank] times ``down`` [rank, in], zero at the start."""

    def __init__(self, quantizer: WeightQuantizer, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__(quantizer.scale.detach(), quantizer.fmt)
        self.log_scale = quantizer.log_scale
        out, inputs = weight.flatten(1).shape
        down = torch.randn(rank, inputs, generator=generator) * inputs**-0.5  # on the CPU: the same on every device
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(weight.new_zeros(out, rank))

    def merged(self, weight: Tensor) -> Tensor:
        """Returns the weight with its update."""
        return weight + (self.up @ self.down).view_as(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the merged weight on its grid."""
        return super().forward(self.merged(weight))

    def plain(self) -> WeightQuantizer:
        """Returns the quantizer without the update."""
        quantizer = WeightQuantizer(self.scale.detach(), self.fmt)
        quantizer.log_scale = self.log_scale
        return quantizer


def attach_adapters(state: TrainingState, rank: int, seed: int) -> None:
    """Gives every weight-quantized layer an update of that rank; nothing else but scales is trained from then on."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in state.denoiser.inner.named_parameters():
        parameter.requires_grad_(name.endswith("log_scale"))
    for layer in state.weight_layers().values():
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, WeightQuantizer), "a weight layer"
        layer.weight_quantizer = AdaptedWeightQuantizer(quantizer, layer.weight, rank, generator)


@torch.no_grad()
def merge_adapters(state: TrainingState) -> None:
    """Puts the updates into the weights and takes them away."""
    for layer in state.weight_layers().values():
        quantizer = layer.weight_quantizer
        if isinstance(quantizer, AdaptedWeightQuantizer):
            layer.weight.copy_(quantizer.merged(layer.weight))
            layer.weight_quantizer = quantizer.plain()


def adapter_rates(state: TrainingState) -> list[tuple[list[nn.Parameter], float]]:
    """Each layer's update and the factor of its rate: its mean weight scale over the mean of the layers.

    EfficientDM scales the gradient of ``B A`` by the weight scale, for updates of the size of a step of the grid. Adam
    takes a gradient's size away, so the rate has the factor.
    """
    found = [layer.weight_quantizer for layer in state.weight_layers().values()]
    adapters = [quantizer for quantizer in found if isinstance(quantizer, AdaptedWeightQuantizer)]
    sizes = [float(adapter.scale.detach().mean()) for adapter in adapters]
    mean = sum(sizes) / max(1, len(sizes))
    return [([adapter.down, adapter.up], size / mean) for adapter, size in zip(adapters, sizes, strict=True)]
