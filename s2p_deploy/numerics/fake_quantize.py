"""Quantize, dequantize, and the two in one with LSQ's gradient (arXiv 1902.08153, symmetric form)."""

from __future__ import annotations

from functools import cache
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
    """Few passes over memory, which is what this costs: in place where a tensor is its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, fmt: IntegerFormat) -> Tensor:  # noqa: ANN401 - autograd's context has no public type
        result = (x / scale).round_().clamp_(fmt.qmin, fmt.qmax).mul_(scale)
        ctx.save_for_backward(x, scale, result)  # the layer that reads the result keeps it anyway
        ctx.fmt = fmt
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # noqa: ANN401 - as above
        x, scale, result = ctx.saved_tensors
        ratio = x / scale
        low, high = _beyond(ctx.fmt, ratio.dtype)
        grad_x: Tensor = torch.ops.aten.hardtanh_backward(grad, ratio, low, high)  # zero at the limits and outside
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        # The slope times the scale is result - x inside the range and result outside.
        change = torch.mul(grad, result).addcmul_(grad_x, x, value=-1)
        shared = x.numel() // scale.numel()
        return grad_x, change.sum_to_size(scale.shape) / scale * (shared * ctx.fmt.qmax) ** -0.5, None


@cache
def _beyond(fmt: IntegerFormat, dtype: torch.dtype) -> tuple[float, float]:
    """The floating-point numbers next to a format's range."""
    limits = torch.tensor([fmt.qmin, fmt.qmax], dtype=dtype)
    low, high = torch.nextafter(limits, limits * 2).tolist()
    return low, high
