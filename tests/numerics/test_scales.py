from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2p_deploy.numerics import (
    INT4,
    INT8,
    IntegerFormat,
    fake_quantize,
    least_squares_weight_scale,
    max_scale,
    max_weight_scale,
    mse_best_scale,
    weight_scale_shape,
)

FORMATS = st.sampled_from([INT4, INT8])
THREE_LEVELS = IntegerFormat("three levels", -1, 1)
SEEDS = st.integers(0, 2**31)


def error(x: torch.Tensor, scale: torch.Tensor, fmt: IntegerFormat) -> float:
    return float((fake_quantize(x, scale, fmt) - x).square().sum())


def test_shapes_broadcast_over_output_channels() -> None:
    assert weight_scale_shape(torch.empty(5, 3, 2, 2)) == (5, 1, 1, 1)
    assert weight_scale_shape(torch.empty(5, 3)) == (5, 1)
    assert least_squares_weight_scale(torch.randn(5, 3, 2, 2), INT4).shape == (5, 1, 1, 1)


def test_weights_on_a_grid_get_the_grids_scale() -> None:
    codes = torch.tensor([[-7.0, -3.0, 0.0, 1.0, 7.0], [7.0, 5.0, 2.0, -4.0, -7.0]])
    scale = torch.tensor([[0.03], [2.0]])
    torch.testing.assert_close(least_squares_weight_scale(codes * scale, INT4), scale)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("shape", [(7, 33, 3, 3), (3, 300_000), (1, 300_000), (515, 2, 7, 91), (1025, 1024)])
def test_neighbours_in_the_cache_change_no_bit(shape: tuple[int, ...], threads: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = least_squares_weight_scale(weight, INT4)
        lone = [least_squares_weight_scale(pair, INT4) for pair in weight.tensor_split(max(1, shape[0] // 2))]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, torch.cat(lone))


def test_an_outlier_is_clipped_where_that_costs_less() -> None:
    # 2,000 values of +-1 and one of 8: at scale 8/7 the many are wrong by 1/7 each, 41 in all. Clipped to 7, the least
    # squares of 2000 (1 - s)^2 + (8 - 7 s)^2 is at s = (2000 + 56) / (2000 + 49).
    weight = torch.ones(1, 2001)
    weight[0, ::2] = -1
    weight[0, 2000] = 8
    scale = least_squares_weight_scale(weight, INT4)
    torch.testing.assert_close(scale, torch.tensor([[2056 / 2049]]))


def test_the_mse_best_clip_by_hand() -> None:
    # Candidates are 2 and 4 (half of the peak and the peak, over 7): 28 fits both; 14 and -14 want scale 2 or 4 alike,
    # but 2 fits only scale 2, and clipping 28 to 14 costs 196 against 4: scale 4 wins.
    x = torch.tensor([28.0, 14.0 * 2 / 7, 2.0])
    assert float(mse_best_scale(x, INT4, candidates=2, lowest=0.5)) == 4.0
    many = torch.cat([torch.full((100,), 2.0), torch.tensor([28.0])])
    assert float(mse_best_scale(many, INT4, candidates=2, lowest=0.5)) == 2.0


@given(SEEDS, FORMATS)
def test_least_squares_is_no_worse_than_the_peak(seed: int, fmt: IntegerFormat) -> None:
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed))
    peak = weight.abs().amax(1, keepdim=True) / fmt.qmax
    scale = least_squares_weight_scale(weight, fmt)
    assert bool((scale > 0).all())
    for row in range(3):
        assert error(weight[row], scale[row], fmt) <= error(weight[row], peak[row], fmt) * 1.0001


@given(SEEDS, FORMATS)
def test_the_mse_best_scale_beats_its_neighbours(seed: int, fmt: IntegerFormat) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) ** 3
    best = mse_best_scale(x, fmt)
    peak = x.abs().max() / fmt.qmax
    for fraction in torch.linspace(0.3, 1.0, 24):
        assert error(x, best, fmt) <= error(x, fraction * peak, fmt) * 1.0001


def test_zeros_get_a_positive_scale() -> None:
    for fmt in (INT4, INT8):
        assert bool((least_squares_weight_scale(torch.zeros(2, 3), fmt) > 0).all())
        scale = mse_best_scale(torch.zeros(4), fmt)
        assert float(scale) > 0
        assert torch.equal(fake_quantize(torch.zeros(4), scale, fmt), torch.zeros(4))


def test_max_scales_by_hand() -> None:
    weight = torch.tensor([[[1.0, -14.0]], [[3.5, 0.0]]])
    assert torch.equal(max_weight_scale(weight, INT4), torch.tensor([[[2.0]], [[0.5]]]))
    assert torch.equal(max_weight_scale(weight, THREE_LEVELS), torch.tensor([[[14.0]], [[3.5]]]))
    assert max_scale(weight, INT4) == 2.0
    assert bool((max_weight_scale(torch.zeros(2, 3), INT8) > 0).all())
    assert max_scale(torch.zeros(3), INT8) > 0
