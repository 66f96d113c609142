"""Quantize, dequantize, and the two in one with LSQ's gradient (arXiv 1902.08153, symmetric form)."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from types import ModuleType

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
    """Few passes over memory, which is what this costs: in place where a tensor is its own; on a GPU one kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, fmt: IntegerFormat) -> Tensor:  # noqa: ANN401 - autograd's context has no public type
        kernels = _kernels(x, scale)
        if kernels:
            result: Tensor = kernels.on_grid(x, scale, fmt)
        else:
            result = (x / scale).round_().clamp_(fmt.qmin, fmt.qmax).mul_(scale)
        ctx.save_for_backward(x, scale, result)  # the layer that reads the result keeps it anyway
        ctx.fmt = fmt
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # noqa: ANN401 - as above
        x, scale, result = ctx.saved_tensors
        shared = x.numel() // scale.numel()
        share = (shared * ctx.fmt.qmax) ** -0.5
        kernels = _kernels(x, scale)
        if kernels:
            grad_x, change = kernels.gradients(grad, x, scale, ctx.fmt, of_scale=ctx.needs_input_grad[1])
            return grad_x, None if change is None else change * share, None
        ratio = x / scale
        low, high = _beyond(ctx.fmt, ratio.dtype)
        grad_x = torch.ops.aten.hardtanh_backward(grad, ratio, low, high)  # zero at the limits and outside
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        # The slope times the scale is result - x inside the range and result outside.
        change = torch.mul(grad, result).addcmul_(grad_x, x, value=-1)
        return grad_x, change.sum_to_size(scale.shape) / scale * share, None


def _kernels(x: Tensor, scale: Tensor) -> ModuleType | None:
    """Returns the GPU's kernels where they can be used: Triton comes with PyTorch's builds for GPUs."""
    module = _triton_kernels() if x.device.type == "cuda" else None
    return module if module and module.takes(x, scale) else None


@cache
def _triton_kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("s2p_deploy.numerics.triton_kernels")


@cache
def _beyond(fmt: IntegerFormat, dtype: torch.dtype) -> tuple[float, float]:
    """Returns the floating-point numbers next to a format's range."""
    limits = torch.tensor([fmt.qmin, fmt.qmax], dtype=dtype)
    low, high = torch.nextafter(limits, limits * 2).tolist()
    return low, high
