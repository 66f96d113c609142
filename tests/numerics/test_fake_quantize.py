from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from s2p_deploy.numerics import INT4, INT8, IntegerFormat, dequantize, fake_quantize, quantize

FORMATS = st.sampled_from([INT4, INT8])
SCALES = st.floats(2**-10, 2**10, width=32)
VALUES = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=32).map(torch.tensor)


def test_codes_round_half_to_even_and_saturate() -> None:
    x = torch.tensor([-5.0, -4.0, -1.25, -0.75, -0.25, 0.0, 0.25, 0.75, 1.25, 3.4, 3.9, 9.0])
    codes = quantize(x, torch.tensor(0.5), INT4)
    assert codes.tolist() == [-8, -8, -2, -2, 0, 0, 0, 2, 2, 7, 7, 7]
    assert dequantize(codes, torch.tensor(0.5)).tolist() == [-4, -4, -1, -1, 0, 0, 0, 1, 1, 3.5, 3.5, 3.5]


def test_each_channel_has_its_own_scale() -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    scale = torch.tensor([[1.0], [0.25]])
    assert quantize(x, scale, INT4).tolist() == [[1, 2], [4, 7]]
    assert fake_quantize(x, scale, INT4).tolist() == [[1, 2], [1, 1.75]]


def test_the_lsq_gradient_by_hand() -> None:
    # x / s = -10, -1.2, 0.3, 2.6, 8; slopes d/ds: qmin, -1+1.2, 0-0.3, 3-2.6, qmax; upstream 1, 2, 3, 4, 5.
    x = torch.tensor([-5.0, -0.6, 0.15, 1.3, 4.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    (fake_quantize(x, scale, INT4) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 0]
    expected = (1 * -8 + 2 * 0.2 + 3 * -0.3 + 4 * 0.4 + 5 * 7) / (5 * 7) ** 0.5
    torch.testing.assert_close(scale.grad, torch.tensor(expected))


def test_the_limits_belong_to_the_range() -> None:
    low, high = INT4.qmin, INT4.qmax
    x = torch.tensor([low, high, low - 1e-5, high + 1e-5, low - 0.4, high + 0.4], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), INT4).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0, 0, 0]


def test_no_gradient_is_found_that_nobody_asks_for() -> None:
    x, scale = torch.tensor([0.3, 9.0], requires_grad=True), torch.tensor(1.0)
    fake_quantize(x, scale, INT4).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 0]
    fixed, scale = torch.tensor([0.3, 9.0]), scale.requires_grad_()
    fake_quantize(fixed, scale, INT4).sum().backward()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, torch.tensor((0 - 0.3 + 7) / 14**0.5))


@given(VALUES, SCALES, FORMATS)
def test_the_gradient_of_the_scale_is_the_definition(x: Tensor, scale: float, fmt: IntegerFormat) -> None:
    s = torch.tensor(scale, requires_grad=True)
    upstream = torch.linspace(-1, 2, len(x))
    (fake_quantize(x, s, fmt) * upstream).sum().backward()
    ratio = x.double() / scale
    inside = (ratio >= fmt.qmin) & (ratio <= fmt.qmax)
    codes = quantize(x, s.detach(), fmt).double()
    slope = torch.where(inside, codes - ratio, codes)
    assert s.grad is not None
    size = (upstream * (slope.abs() + 1e-4 * codes.abs())).abs().sum() + 1e-4
    found, expected = s.grad.double(), (upstream * slope).sum() * (len(x) * fmt.qmax) ** -0.5
    assert abs(float(found - expected)) <= 1e-4 * float(size)


def test_a_samples_gradient_is_its_own() -> None:
    x = torch.tensor([[0.3, 9.0], [0.6, -0.2]])
    scale = torch.ones(2, 1, requires_grad=True)
    fake_quantize(x, scale, INT4).sum().backward()
    assert scale.grad is not None
    # Two values share each scale: factor 1 / sqrt(2 * 7).
    expected = torch.tensor([[0 - 0.3 + 7], [1 - 0.6 + 0.2]]) / 14**0.5
    torch.testing.assert_close(scale.grad, expected)


@given(VALUES, SCALES, FORMATS)
def test_values_in_range_move_by_half_a_step_at_most(x: Tensor, scale: float, fmt: IntegerFormat) -> None:
    s = torch.tensor(scale)
    inside = x.clamp(fmt.qmin * s, fmt.qmax * s)
    error = (fake_quantize(inside, s, fmt) - inside).abs()
    assert bool((error <= 0.5001 * s).all())


@given(VALUES, SCALES, FORMATS)
def test_codes_are_integers_of_the_format(x: Tensor, scale: float, fmt: IntegerFormat) -> None:
    codes = quantize(x, torch.tensor(scale), fmt)
    assert torch.equal(codes, codes.round())
    assert bool(((codes >= fmt.qmin) & (codes <= fmt.qmax)).all())


@given(VALUES, SCALES, FORMATS)
def test_quantizing_again_changes_nothing(x: Tensor, scale: float, fmt: IntegerFormat) -> None:
    s = torch.tensor(scale)
    once = fake_quantize(x, s, fmt)
    assert torch.equal(fake_quantize(once, s, fmt), once)


@given(VALUES, SCALES, st.integers(-20, 20), FORMATS)
def test_a_power_of_two_scales_exactly(x: Tensor, scale: float, power: int, fmt: IntegerFormat) -> None:
    s, factor = torch.tensor(scale), 2.0**power
    assert torch.equal(fake_quantize(x * factor, s * factor, fmt), fake_quantize(x, s, fmt) * factor)


@given(VALUES, SCALES, FORMATS)
def test_more_input_never_means_less_output(x: Tensor, scale: float, fmt: IntegerFormat) -> None:
    ordered = fake_quantize(x.sort().values, torch.tensor(scale), fmt)
    assert bool((ordered.diff() >= 0).all())
