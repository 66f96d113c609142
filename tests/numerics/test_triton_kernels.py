"""The GPU's kernels in Triton's interpreter, which runs them on the CPU; Triton comes with PyTorch's CUDA builds."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING

import pytest
import torch

from s2p_deploy.numerics import INT4, INT8, IntegerFormat, fake_quantize

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

SHAPES = [((5,), (1,)), ((3, 1, 700), (3, 1, 1)), ((2, 4, 33, 17), (2, 1, 1, 1)), ((3000,), ()), ((4, 9), (1, 1))]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    if importlib.util.find_spec("triton") is None or os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("Triton is not installed, or runs on the GPU")
    return importlib.import_module("s2p_deploy.numerics.triton_kernels")


def numbers(shape: tuple[int, ...], of_scale: tuple[int, ...], fmt: IntegerFormat) -> tuple[Tensor, Tensor]:
    """Values around the grid's middle, limits and halves, and scales that are no powers of two."""
    generator = torch.Generator().manual_seed(5)
    scale = 0.003 + torch.rand(of_scale, generator=generator)
    halves = torch.randint(2 * fmt.qmin - 3, 2 * fmt.qmax + 3, shape, generator=generator) / 2
    near = torch.randn(shape, generator=generator) * fmt.qmax
    return torch.where(torch.rand(shape, generator=generator) < 0.5, halves, near) * scale, scale


@pytest.mark.parametrize("fmt", [INT4, INT8])
@pytest.mark.parametrize(("shape", "of_scale"), SHAPES)
def test_values_are_those_of_pytorch_bit_for_bit(
    kernels: ModuleType, shape: tuple[int, ...], of_scale: tuple[int, ...], fmt: IntegerFormat
) -> None:
    x, scale = numbers(shape, of_scale, fmt)
    assert kernels.takes(x, scale)
    assert torch.equal(kernels.on_grid(x, scale, fmt), fake_quantize(x, scale, fmt))


@pytest.mark.parametrize("fmt", [INT4, INT8])
@pytest.mark.parametrize(("shape", "of_scale"), SHAPES)
def test_gradients_are_those_of_pytorch(
    kernels: ModuleType, shape: tuple[int, ...], of_scale: tuple[int, ...], fmt: IntegerFormat
) -> None:
    x, scale = (value.requires_grad_() for value in numbers(shape, of_scale, fmt))
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    fake_quantize(x, scale, fmt).backward(grad)
    of_x, of_scales = kernels.gradients(grad, x.detach(), scale.detach(), fmt, of_scale=True)
    assert x.grad is not None
    assert torch.equal(of_x, x.grad)
    share = (x.numel() // scale.numel() * fmt.qmax) ** -0.5
    torch.testing.assert_close(of_scales * share, scale.grad, rtol=1e-4, atol=1e-5 * fmt.qmax)
    assert kernels.gradients(grad, x.detach(), scale.detach(), fmt, of_scale=False)[1] is None


def test_half_precision_is_quantized_in_float32(kernels: ModuleType) -> None:
    x, scale = numbers((2, 300), (2, 1), INT8)
    half = x.half()
    found = kernels.on_grid(half, scale, INT8)
    assert found.dtype == torch.float32
    assert torch.equal(found, fake_quantize(half, scale, INT8))


def test_a_nan_stays_one_and_infinities_are_limited(kernels: ModuleType) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.0])
    found = kernels.on_grid(x, torch.tensor([0.5]), INT4)
    assert found.isnan().tolist() == [True, False, False, False]
    assert found[1:].tolist() == [3.5, -4.0, 3.0]


@pytest.mark.parametrize(
    ("x", "scale"),
    [
        (torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), torch.ones(2, 1, 1, 1)),
        (torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 1)),
        (torch.ones(2, 3), torch.ones(2, 1, dtype=torch.float64)),
        (torch.ones(2, 3), torch.ones(1, 3)),
        (torch.ones(2, 3), torch.ones(3)),
        (torch.ones(0, 3), torch.ones(1)),
    ],
)
def test_other_layouts_are_left_to_pytorch(kernels: ModuleType, x: Tensor, scale: Tensor) -> None:
    assert not kernels.takes(x, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [INT4, INT8])
@pytest.mark.parametrize(("shape", "of_scale"), SHAPES)
def test_a_gpu_gives_the_cpus_codes(shape: tuple[int, ...], of_scale: tuple[int, ...], fmt: IntegerFormat) -> None:
    x, scale = numbers(shape, of_scale, fmt)
    there = [value.cuda().requires_grad_() for value in (x, scale)]
    here = [value.clone().requires_grad_() for value in (x, scale)]
    found, expected = fake_quantize(*there, fmt), fake_quantize(*here, fmt)
    assert torch.equal(found.cpu(), expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for given, wanted in zip(there, here, strict=True):
        assert given.grad is not None
        torch.testing.assert_close(given.grad.cpu(), wanted.grad, rtol=1e-4, atol=1e-3)
