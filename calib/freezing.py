"""Selective freezing (S2P's second version; its rule is not known, so two readings of it).

Layers: only the most sensitive layers train their weights. Oscillation: weights whose codes flip back and forth stay at
their mean code (Nagel et al., arXiv 2203.11086; the falling threshold is SSVQ's, arXiv 2503.08668).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from s2p_deploy.calib.quantized_denoiser import QuantizedConv2d, QuantizedLinear, WeightQuantizer
from s2p_deploy.errors import InputError
from s2p_deploy.numerics import quantize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from s2p_deploy.calib.training_state import TrainingState
    from s2p_deploy.recipe import Freezing


def freeze_layers(state: TrainingState, trained: float) -> None:
    """Freezes the weights of all layers but the ``trained`` share of largest sensitivity in the plan; scales train.

    Raises:
        InputError: a layer has no sensitivity.
    """
    layers = state.denoiser.plan.layers
    sensitivities = {layer.name: layer.sensitivity for layer in layers if layer.sensitivity is not None}
    missing = [layer.name for layer in layers if layer.name not in sensitivities]
    if missing:
        raise InputError(f"freezing.what: layers needs the sensitivity of {missing[0]}: set recipe.mixed.sensitivity")
    ranked = sorted(layers, key=lambda layer: (-sensitivities[layer.name], layer.name))
    for plan in ranked[round(trained * len(ranked)) :]:
        module = state.denoiser.layer(plan.name)
        for name, parameter in module.named_parameters():
            if name != "bias" and not name.endswith("log_scale"):
                parameter.requires_grad = False


class Oscillation:
    """How often each weight's code flips back, and the weights that are frozen for it.

    With m = 1 / ``every``: ``flips`` averages 1 where a code's change reverses its last change, ``mean`` averages the
    code. Every ``every`` updates, weights with ``flips`` over the threshold are frozen at round(``mean``). A frozen
    weight is code times scale from then on, so its scale has the code for a slope.
    """

    def __init__(self, state: TrainingState, freezing: Freezing, iterations: int) -> None:
        self.freezing, self.iterations = freezing, iterations
        self.tracks = {name: WeightTrack(layer, 1 / freezing.every) for name, layer in state.weight_layers().items()}

    def threshold(self, updates: int) -> float:
        """Falls from ``start`` to ``end`` by a cosine over the training."""
        low, high = self.freezing.end, self.freezing.start
        return low + 0.5 * (high - low) * (1 + math.cos(math.pi * updates / self.iterations))

    def before_update(self) -> None:
        """Moves the gradients of frozen weights to their scales."""
        for track in self.tracks.values():
            track.pass_gradient_on()

    def after_update(self, updates: int) -> None:
        """Notes what the update of that number (from 1) did to the codes; freezes every ``every`` updates."""
        limit = self.threshold(updates) if updates % self.freezing.every == 0 else None
        for track in self.tracks.values():
            track.follow(limit)

    def frozen(self) -> Tensor:
        """Counts the frozen weights, float64 [] on their device."""
        return torch.stack([track.frozen.sum() for track in self.tracks.values()]).sum().double()

    def oscillating(self, updates: int) -> Tensor:
        """Counts the weights that would be frozen now, float64 [] on their device."""
        limit = self.threshold(updates)
        counts = [((track.flips > limit) & ~track.frozen).sum() for track in self.tracks.values()]
        return torch.stack(counts).sum().double()

    def tensors(self) -> dict[str, Tensor]:
        """Collects all of it by name, for the checkpoint."""
        return {f"{name}/{key}": value for name, track in self.tracks.items() for key, value in track.tensors().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`tensors` collected."""
        for name, track in self.tracks.items():
            for key, value in track.tensors().items():
                value.copy_(tensors[f"{name}/{key}"])


class WeightTrack:
    """One weight tensor: ``code`` and ``direction`` (of its last change) int8, ``flips`` and ``mean`` float32."""

    def __init__(self, layer: QuantizedConv2d | QuantizedLinear, momentum: float) -> None:
        assert isinstance(layer.weight_quantizer, WeightQuantizer), "a weight layer"
        self.weight, self.quantizer, self.momentum = layer.weight, layer.weight_quantizer, momentum
        codes = self._codes()
        self.code = codes.to(torch.int8)
        self.mean = codes
        self.flips = torch.zeros_like(codes)
        self.direction = torch.zeros_like(self.code)
        self.frozen = torch.zeros_like(codes, dtype=torch.bool)

    def tensors(self) -> dict[str, Tensor]:
        """Collects all of it by name."""
        return {name: getattr(self, name) for name in ("code", "mean", "flips", "direction", "frozen")}

    @torch.no_grad()
    def pass_gradient_on(self) -> None:
        """Moves gradients of frozen weights to the scale: with w = code * scale, d/d log scale is w times d/d w.

        LSQ's own slope is zero on the grid.
        """
        gradient, log_scale = self.weight.grad, self.quantizer.log_scale
        if gradient is None or log_scale.grad is None:
            return
        share = self.weight.numel() // log_scale.numel() * self.quantizer.fmt.qmax
        slope = (gradient * self.weight * self.frozen).sum_to_size(log_scale.shape)
        log_scale.grad += slope * share**-0.5
        gradient.masked_fill_(self.frozen, 0.0)

    @torch.no_grad()
    def follow(self, limit: float | None) -> None:
        """Notes the codes after an update; freezes weights that flip more often than ``limit``, if there is one."""
        codes = torch.where(self.frozen, self.code, self._codes())
        change = (codes - self.code).sign().to(torch.int8)
        flipped = (change != 0) & (change == -self.direction)
        self.flips.lerp_(flipped.float(), self.momentum)
        self.mean.lerp_(codes, self.momentum)
        self.direction.copy_(torch.where(change != 0, change, self.direction))
        self.code.copy_(codes)
        if limit is not None:
            newly = (self.flips > limit) & ~self.frozen
            self.code.copy_(torch.where(newly, self.mean.round(), self.code))
            self.frozen |= newly
        self.weight.copy_(torch.where(self.frozen, self.code * self.quantizer.scale, self.weight))

    def _codes(self) -> Tensor:
        return quantize(self.weight.detach(), self.quantizer.scale.detach(), self.quantizer.fmt)
