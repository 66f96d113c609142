"""Closed-form starting grids: least squares or the peak for weights, the MSE-best clip or the peak for activations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from s2p_deploy.numerics.fake_quantize import dequantize, quantize

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.numerics.formats import IntegerFormat

_FLOOR = torch.finfo(torch.float32).tiny ** 0.5  # keeps the scale of an all-zero tensor positive and invertible
_BLOCK = 1 << 18  # weights at a time: what stays in a processor's cache is done in a quarter of the time


def weight_scale_shape(weight: Tensor) -> tuple[int, ...]:
    """Shape of a per-output-channel scale that broadcasts: [out, 1, ...]."""
    return (weight.shape[0],) + (1,) * (weight.dim() - 1)


def least_squares_weight_scale(weight: Tensor, fmt: IntegerFormat, rounds: int = 10) -> Tensor:
    """Per-output-channel scale float32 [out, 1, ...] by alternating least squares (BitsFusion, arXiv 2406.04333).

    Each round takes the codes q of the present scale and solves ``min |w - s q|^2`` for s, from several starting clips;
    the start with the smallest error wins, so that no channel ends in a poor local minimum.
    """
    # no block has one channel of many: a sum over a single row is shared out among threads in another order
    blocks = max(1, min(math.ceil(weight.numel() / _BLOCK), weight.shape[0] // 2))
    flat = weight.detach().flatten(1)
    scales = [_least_squares_scale(channels.float(), fmt, rounds) for channels in flat.tensor_split(blocks)]
    return torch.cat(scales).view(weight_scale_shape(weight))


def _least_squares_scale(flat: Tensor, fmt: IntegerFormat, rounds: int) -> Tensor:
    """Computes the scale [out, 1] of each row of ``flat`` float32 [out, N]. No row's depends on another's."""
    peak = flat.abs().amax(1, keepdim=True).clamp_min(_FLOOR * fmt.qmax)
    best_scale, best_error = peak / fmt.qmax, torch.full_like(peak, torch.inf)
    for clip in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        scale = clip * peak / fmt.qmax
        for _ in range(rounds):
            codes = quantize(flat, scale, fmt)
            power = (codes * codes).sum(1, keepdim=True)
            scale = torch.where(power > 0, (flat * codes).sum(1, keepdim=True) / power.clamp_min(1), scale)
            scale = scale.clamp_min(_FLOOR)
        error = (dequantize(quantize(flat, scale, fmt), scale) - flat).square().sum(1, keepdim=True)
        better = error < best_error
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    return best_scale


def max_weight_scale(weight: Tensor, fmt: IntegerFormat) -> Tensor:
    """Per-output-channel scale float32 [out, 1, ...] that puts a channel's largest magnitude on ``qmax``."""
    peak = weight.detach().float().flatten(1).abs().amax(1).clamp_min(_FLOOR * fmt.qmax)
    return (peak / fmt.qmax).view(weight_scale_shape(weight))


def max_scale(x: Tensor, fmt: IntegerFormat) -> Tensor:
    """Computes the per-tensor scale (float32 scalar) that puts the largest magnitude on ``qmax``."""
    return x.detach().float().abs().max().clamp_min(_FLOOR * fmt.qmax) / fmt.qmax


def mse_best_scale(x: Tensor, fmt: IntegerFormat, candidates: int = 24, lowest: float = 0.3) -> Tensor:
    """Finds the per-tensor scale (float32 scalar) whose clip minimises the mean squared error over ``x``.

    Candidates are evenly spaced fractions of ``max|x| / qmax`` from ``lowest`` to 1.
    """
    flat = x.detach().float().flatten()
    peak = flat.abs().max().clamp_min(_FLOOR * fmt.qmax) / fmt.qmax
    scales = peak * torch.linspace(lowest, 1.0, candidates, device=flat.device)
    errors = torch.stack([(dequantize(quantize(flat, s, fmt), s) - flat).square().mean() for s in scales])
    return scales.take(errors.argmin())
