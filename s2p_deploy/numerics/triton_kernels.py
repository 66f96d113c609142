"""Fake quantization on a GPU in one pass over memory each way: the codes are those of PyTorch's own operators.

Only :mod:`s2p_deploy.numerics.fake_quantize` imports this, for tensors on a GPU. Triton's ``/`` is an approximation,
which moves codes, so the division as IEEE 754 rounds it is asked for by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.numerics.formats import IntegerFormat

_BLOCK = 1024
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def takes(x: Tensor, scale: Tensor) -> bool:
    """Tells whether the kernels know a layout: one float32 scale for all of ``x``, or one per index of its first axis.

    Other layouts, such as channels last, are left to PyTorch's operators.
    """
    per_row = scale.dim() == x.dim() and scale.numel() == scale.shape[0] == x.shape[0]
    known = x.is_contiguous() and x.dtype in _FLOATS and scale.dtype == torch.float32
    return known and x.numel() > 0 and (scale.numel() == 1 or per_row)


def on_grid(x: Tensor, scale: Tensor, fmt: IntegerFormat) -> Tensor:
    """Puts ``x`` [rows, ...] on the grid of ``scale`` [rows, 1, ...] or [1]: float32, of the shape of ``x``."""
    result = torch.empty_like(x, dtype=torch.float32)
    length = x.numel() // scale.numel()
    grid = triton.cdiv(length, _BLOCK), scale.numel()
    with _current(x):
        _on_grid_kernel[grid](x, scale.contiguous(), result, length, fmt.qmin, fmt.qmax, _BLOCK)
    return result


def gradients(
    grad: Tensor, x: Tensor, scale: Tensor, fmt: IntegerFormat, *, of_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """Computes the gradients of :func:`on_grid`, float32: for ``x``, and where asked for the sums for ``scale``.

    A row's sum is made in the same order every time.
    """
    grad_x = torch.empty_like(x, dtype=torch.float32)
    length = x.numel() // scale.numel()
    grid = triton.cdiv(length, _BLOCK), scale.numel()
    sums = torch.empty(scale.numel(), grid[0] if of_scale else 0, device=x.device)
    with _current(x):
        _gradients_kernel[grid](
            grad.contiguous(), x, scale.contiguous(), grad_x, sums, length, fmt.qmin, fmt.qmax, of_scale, _BLOCK
        )
    return grad_x, sums.sum(1).view(scale.shape) if of_scale else None


def _current(x: Tensor) -> torch.cuda.device:
    """Makes a tensor's GPU the one that Triton launches on; no GPU, no change (Triton's interpreter)."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


@triton.jit
def _codes_and_ratio(x, scale, qmin: tl.constexpr, qmax: tl.constexpr):
    ratio = tl.div_rn(x, scale)
    limited = tl.clamp(ratio, float(qmin), float(qmax), propagate_nan=tl.PropagateNan.ALL)
    # Adding 1.5 * 2**23 leaves no bit for a fraction: it rounds half to even. Integer limits may come before rounding.
    return (limited + 12582912.0) - 12582912.0, ratio


@triton.jit
def _on_grid_kernel(x_at, scale_at, result_at, length, qmin: tl.constexpr, qmax: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * block + tl.arange(0, block)
    there = column < length
    scale = tl.load(scale_at + row)
    x = tl.load(x_at + row * length + column, there, other=0.0).to(tl.float32)
    codes, _ = _codes_and_ratio(x, scale, qmin, qmax)
    tl.store(result_at + row * length + column, codes * scale, there)


@triton.jit
def _gradients_kernel(
    grad_at,
    x_at,
    scale_at,
    grad_x_at,
    sums_at,
    length,
    qmin: tl.constexpr,
    qmax: tl.constexpr,
    of_scale: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * block + tl.arange(0, block)
    there = column < length
    scale = tl.load(scale_at + row)
    x = tl.load(x_at + row * length + column, there, other=0.0).to(tl.float32)
    grad = tl.load(grad_at + row * length + column, there, other=0.0).to(tl.float32)
    codes, ratio = _codes_and_ratio(x, scale, qmin, qmax)
    inside = (ratio >= qmin) & (ratio <= qmax)
    tl.store(grad_x_at + row * length + column, tl.where(inside, grad, 0.0), there)
    if of_scale:
        slope = codes - tl.where(inside, ratio, 0.0)
        tl.store(sums_at + row * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(there, grad * slope, 0.0)))
