from __future__ import annotations

import pytest

from s2p_deploy.numerics import INT4, INT8, LEVELS3, LEVELS5, LEVELS9, format_by_name


def test_limits_are_onnxs() -> None:
    assert (INT8.qmin, INT8.qmax) == (-128, 127)
    assert (INT4.qmin, INT4.qmax) == (-8, 7)


def test_a_recipes_words() -> None:
    assert (format_by_name("int8"), format_by_name("int4"), format_by_name("none")) == (INT8, INT4, None)
    known = "int8, int4, int10, levels3, levels5, levels9, none"
    with pytest.raises(ValueError, match=f"unknown format 'int2': use one of {known}"):
        format_by_name("int2")


def test_balanced_formats_have_an_odd_level_count_with_zero_in_the_middle() -> None:
    limits = {fmt.levels: (fmt.qmin, fmt.qmax) for fmt in (LEVELS3, LEVELS5, LEVELS9)}
    assert limits == {3: (-1, 1), 5: (-2, 2), 9: (-4, 4)}
    assert [round(fmt.bits, 2) for fmt in (LEVELS3, LEVELS5, LEVELS9, INT4, INT8)] == [1.58, 2.32, 3.17, 4, 8]
