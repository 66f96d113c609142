"""Quantize, dequantize, and the two in one with LSQ's gradient (arXiv 1902.08153, symmetric form)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.numerics.formats import IntegerFormat


def quantize(x: Tensor, scale: Tensor, fmt: IntegerFormat) -> Tensor:
    """Codes of ``x``, as floats: ``clamp(round_half_even(x / scale), qmin, qmax)``.

    ``scale`` broadcasts against ``x``: one element per tensor, [n, 1, ...] per sample, [out, 1, ...] per channel.
    """
    return torch.clamp(torch.round(x / scale), fmt.qmin, fmt.qmax)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Values of codes: ``codes * scale``."""
    return codes * scale


def fake_quantize(x: Tensor, scale: Tensor, fmt: IntegerFormat) -> Tensor:
    """``dequantize(quantize(x))`` with gradients: straight through inside the range for ``x``, LSQ's for ``scale``.

    d/d scale is ``round(x/s) - x/s`` inside the range and ``qmin`` or ``qmax`` outside, times ``1 / sqrt(n * qmax)``
    where ``n`` is the number of values that share one scale.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, fmt)  # type: ignore[no-untyped-call]  # torch's own
    return result


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, fmt: IntegerFormat) -> Tensor:  # noqa: ANN401 - autograd's context has no public type
        ctx.save_for_backward(x, scale)
        ctx.fmt = fmt
        return dequantize(quantize(x, scale, fmt), scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # noqa: ANN401 - as above
        x, scale = ctx.saved_tensors
        fmt = ctx.fmt
        ratio = x / scale
        inside = (ratio >= fmt.qmin) & (ratio <= fmt.qmax)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, torch.round(ratio) - ratio, ratio.clamp(fmt.qmin, fmt.qmax))
            shared = x.numel() // scale.numel()
            grad_scale = (grad * slope).sum_to_size(scale.shape) * (shared * fmt.qmax) ** -0.5
        return grad * inside, grad_scale, None
