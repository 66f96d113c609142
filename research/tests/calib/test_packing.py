from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2p_deploy.numerics import INT4, INT8, IntegerFormat
from s2p_research.formats import INT10, LEVELS3, LEVELS5, LEVELS9
from s2p_research.packing import codes_per_byte, pack_codes, unpack_codes

FORMATS = (LEVELS3, LEVELS5, LEVELS9, INT4, INT8)


def test_digits_per_byte() -> None:
    assert [codes_per_byte(fmt) for fmt in (*FORMATS, INT10)] == [5, 3, 2, 2, 1, 0]


def test_bytes_by_hand() -> None:
    codes = torch.tensor([[-1, 0, 1], [1, 1, 0]])  # digits 0 1 2, 2 2 1
    assert pack_codes(codes, LEVELS3).tolist() == [0 + 1 * 3 + 2 * 9 + 2 * 27 + 2 * 81, 1]
    assert pack_codes(torch.tensor([2, -2, 0]), LEVELS5).tolist() == [4 + 0 + 2 * 25]
    assert pack_codes(torch.tensor([-4.0, 4.0]), LEVELS9).tolist() == [8 * 9]
    assert pack_codes(torch.tensor([-8, 7]), INT4).tolist() == [15 * 16]


@given(fmt=st.sampled_from(FORMATS), shape=st.lists(st.integers(1, 7), max_size=4), seed=st.integers(0, 2**16))
def test_round_trip(fmt: IntegerFormat, shape: list[int], seed: int) -> None:
    codes = torch.randint(fmt.qmin, fmt.qmax + 1, shape, generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, fmt)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-codes.numel() // codes_per_byte(fmt)),)
    unpacked = unpack_codes(packed, fmt, shape)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes.to(torch.int8))


@pytest.mark.parametrize("code", [-2, 2])
def test_a_code_outside_the_format_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match="outside -1 to 1"):
        pack_codes(torch.tensor([0, code]), LEVELS3)


def test_more_levels_than_a_byte_has_are_refused() -> None:
    with pytest.raises(ValueError, match="int10"):
        pack_codes(torch.tensor([0]), INT10)


def test_bytes_that_are_no_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="6 codes of levels3"):
        unpack_codes(torch.zeros(1, dtype=torch.uint8), LEVELS3, (2, 3))
    with pytest.raises(ValueError, match="byte 243"):
        unpack_codes(torch.tensor([243], dtype=torch.uint8), LEVELS3, (5,))
