from __future__ import annotations

import pytest

from s2p_deploy.numerics import INT4, INT8, format_by_name


def test_limits_are_onnxs() -> None:
    assert (INT8.qmin, INT8.qmax) == (-128, 127)
    assert (INT4.qmin, INT4.qmax) == (-8, 7)


def test_a_recipes_words() -> None:
    assert (format_by_name("int8"), format_by_name("int4"), format_by_name("none")) == (INT8, INT4, None)
    with pytest.raises(ValueError, match="unknown format 'int2': use one of int8, int4, none"):
        format_by_name("int2")
