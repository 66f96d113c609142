"""Low-rank updates in place of the weights (EfficientDM, arXiv 2310.03270): Q(W + B A), merged before quantizing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from s2p_deploy.calib.quantized_denoiser import WeightQuantizer

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.calib.training.state import TrainingState


class AdaptedWeightQuantizer(WeightQuantizer):
    """A weight quantizer that adds an update first: ``up`` [out, rank] times ``down`` [rank, in], zero at the start."""

    def __init__(self, quantizer: WeightQuantizer, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__(quantizer.scale.detach(), quantizer.fmt)
        self.log_scale = quantizer.log_scale
        out, inputs = weight.flatten(1).shape
        self.down = nn.Parameter(torch.randn(rank, inputs, generator=generator) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(out, rank))

    def merged(self, weight: Tensor) -> Tensor:
        """The weight with its update."""
        return weight + (self.up @ self.down).view_as(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """The merged weight on its grid."""
        return super().forward(self.merged(weight))

    def plain(self) -> WeightQuantizer:
        """The quantizer without the update."""
        quantizer = WeightQuantizer(self.scale.detach(), self.fmt)
        quantizer.log_scale = self.log_scale
        return quantizer


def attach_adapters(state: TrainingState, rank: int, seed: int) -> None:
    """Gives every weight-quantized site an update of that rank; nothing else but scales is trained from then on."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in state.denoiser.hot.named_parameters():
        parameter.requires_grad_(name.endswith("log_scale"))
    for site in state.weight_sites().values():
        quantizer = site.weight_quantizer
        assert isinstance(quantizer, WeightQuantizer), "a weight site"
        site.weight_quantizer = AdaptedWeightQuantizer(quantizer, site.weight, rank, generator)


@torch.no_grad()
def merge_adapters(state: TrainingState) -> None:
    """Puts the updates into the weights and takes them away."""
    for site in state.weight_sites().values():
        quantizer = site.weight_quantizer
        if isinstance(quantizer, AdaptedWeightQuantizer):
            site.weight.copy_(quantizer.merged(site.weight))
            site.weight_quantizer = quantizer.plain()


def adapter_rates(state: TrainingState) -> list[tuple[list[nn.Parameter], float]]:
    """Each site's update and the factor of its rate: its mean weight scale over the mean of the sites.

    EfficientDM scales the gradient of ``B A`` by the weight scale, for updates of the size of a step of the grid. Adam
    takes a gradient's size away, so the rate has the factor.
    """
    found = [site.weight_quantizer for site in state.weight_sites().values()]
    adapters = [quantizer for quantizer in found if isinstance(quantizer, AdaptedWeightQuantizer)]
    sizes = [float(adapter.scale.detach().mean()) for adapter in adapters]
    mean = sum(sizes) / max(1, len(sizes))
    return [([adapter.down, adapter.up], size / mean) for adapter, size in zip(adapters, sizes, strict=True)]
