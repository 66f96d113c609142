from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from s2p_deploy.numerics import INT4, INT8, IntegerFormat
from s2p_research.formats import INT10, LEVELS3, LEVELS5, LEVELS9
from s2p_research.grids import affine_grid, full_range, mse_best_range

AFFINE_FORMATS = st.sampled_from([INT4, INT8, INT10, LEVELS5])
SEEDS = st.integers(0, 2**31)


def test_an_affine_grid_by_hand() -> None:
    # Codes -2 to 1 over [-1, 2]: the values are -1, 0, 1, 2, so that code 0 is 1 and zero is code -1.
    scale, offset = affine_grid(torch.tensor(-1.0), torch.tensor(2.0), IntegerFormat("two bits", -2, 1))
    assert (scale, offset) == (1.0, 1.0)
    scale, offset = affine_grid(torch.tensor(0.0), torch.tensor(15.0), INT4)
    assert (scale, offset) == (1.0, 8.0)


def affine_values(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, fmt: IntegerFormat) -> torch.Tensor:
    return scale * torch.clamp(torch.round((x - offset) / scale), fmt.qmin, fmt.qmax) + offset


@given(SEEDS, AFFINE_FORMATS)
def test_an_affine_grid_is_the_standard_asymmetric_quantizer(seed: int, fmt: IntegerFormat) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(100, generator=generator, dtype=torch.float64) + torch.randn((), generator=generator)
    scale, offset = (part.double() for part in affine_grid(*full_range(x), fmt))
    zero_point = torch.round(-offset / scale)
    assert fmt.qmin <= zero_point <= fmt.qmax
    torch.testing.assert_close(-scale * zero_point, offset, rtol=1e-6, atol=0)
    # the offset is float32: zero is met to its last bit
    assert affine_values(torch.zeros(1, dtype=torch.float64), scale, offset, fmt).abs() <= 2**-23 * offset.abs()
    standard = scale * (torch.clamp(torch.round(x / scale) + zero_point, fmt.qmin, fmt.qmax) - zero_point)
    torch.testing.assert_close(affine_values(x, scale, offset, fmt), standard, rtol=0, atol=1e-4 * float(scale))
    assert bool(((standard - x).abs() <= scale * 1.001).all())  # a zero point's rounding clips up to half a code


@given(SEEDS, AFFINE_FORMATS)
def test_the_mse_best_range_beats_its_neighbors(seed: int, fmt: IntegerFormat) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) ** 3 + 1

    def range_error(low: torch.Tensor, high: torch.Tensor) -> float:
        scale, offset = affine_grid(low, high, fmt)
        return float((affine_values(x, scale, offset, fmt) - x).square().sum())

    best = range_error(*mse_best_range(x, fmt))
    low, high = full_range(x)
    for fraction in torch.linspace(0.3, 1.0, 24):
        assert best <= range_error(fraction * low, fraction * high) * 1.0001


def test_ranges_hold_zero() -> None:
    assert full_range(torch.tensor([3.0, 4.0])) == (0.0, 4.0)
    assert full_range(torch.tensor([-3.0, -4.0])) == (-4.0, 0.0)
    scale, offset = affine_grid(*mse_best_range(torch.zeros(4), INT8), INT8)
    assert scale > 0
    assert torch.equal(affine_values(torch.zeros(4), scale, offset, INT8), torch.zeros(4))


def test_balanced_formats_have_an_odd_level_count_with_zero_in_the_middle() -> None:
    limits = {fmt.levels: (fmt.qmin, fmt.qmax) for fmt in (LEVELS3, LEVELS5, LEVELS9)}
    assert limits == {3: (-1, 1), 5: (-2, 2), 9: (-4, 4)}
    assert [round(fmt.bits, 2) for fmt in (LEVELS3, LEVELS5, LEVELS9, INT4, INT8)] == [1.58, 2.32, 3.17, 4, 8]
