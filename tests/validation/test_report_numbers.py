from __future__ import annotations

import pytest

from s2p_deploy.validation.report_numbers import Row, number_rows


def test_numbers_are_found_wherever_they_are() -> None:
    found = {
        "n": 64,
        "lpips": {"median": {"value": 0.1, "low": 0.05, "high": 0.2, "n": 64}},
        "fid_clip": {"skipped": "no weights"},
        "ratio": 0.5,
        "values": {"psnr": [1.0, 2.0]},
        "fine": True,
        "text": "words",
        "broken": {"value": None, "low": None, "high": None, "n": 3},
    }
    assert list(number_rows(found, prefix="pictures")) == [
        Row("pictures, lpips, median", 0.1, 0.05, 0.2, 64),
        Row("pictures, fid clip", None, skipped="no weights"),
        Row("pictures, ratio", 0.5),
        Row("pictures, broken", None, n=3),
    ]


@pytest.mark.parametrize("found", [{}, {"a": {}}, {"a": [1.0]}, {"psnr": {"value": 1.0, "n": 1}}])
def test_what_is_left_out_or_no_number_is_no_row(found: dict[str, object]) -> None:
    assert list(number_rows(found, ("psnr",))) == []
