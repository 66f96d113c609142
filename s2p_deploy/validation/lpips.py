"""LPIPS (arXiv 1801.03924, version 0.1) on AlexNet: how far apart two pictures look.

One file holds the features of AlexNet under torchvision's names (``features.0.weight``, ...) and the five learned
weightings under those of the lpips package (``lin0.model.1.weight``, ...).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10  # in a unit of length
_LAYERS = (2, 5, 8, 10, 12)  # ends of the slices of AlexNet that are compared: behind its ReLUs
_CHANNELS = (64, 192, 384, 256, 256)
SMALLEST = 31  # rows and columns of a picture, below which AlexNet has nothing left


class Lpips(nn.Module):
    """The distance; its weights come from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        for place, channels in enumerate(_CHANNELS):
            model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{place}", nn.ModuleDict({"model": model}))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances float32 [n] of pictures float32 [n, 3, H, W] in [-1, 1]; H and W at least :data:`SMALLEST`."""
        shift, scale = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        both = torch.cat([first, second])
        both, distance, start = (both - shift) / scale, torch.zeros(len(first)), 0
        for place, end in enumerate(_LAYERS):
            both = self.features[start:end](both)
            one, two = (both / (both.square().sum(1, keepdim=True).sqrt() + _EPSILON)).chunk(2)
            weighting = self.get_submodule(f"lin{place}.model")
            distance = distance + weighting((one - two).square()).mean((1, 2, 3))
            start = end
        return distance
