from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s2p_deploy.validation.report_pictures import (
    AMPLIFICATION,
    MOST_PAIRS,
    Pairs,
    difference,
    read_pairs,
    shown_pairs,
    thumbnail,
    write_pairs,
)


def pairs(count: int, side: int = 8) -> Pairs:
    rng = np.random.default_rng(0)
    reference, candidate = rng.integers(0, 256, (2, count, side, side, 3), dtype=np.uint8)
    return Pairs(tuple(f"prompt {index}" for index in range(count)), reference, candidate)


def opened(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))


def test_pictures_are_written_in_pairs_and_read_back(tmp_path: Path) -> None:
    given = pairs(2)
    write_pairs(given, tmp_path / "pictures")
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["000-engine.png", "000-fp.png", "001-engine.png", "001-fp.png"]
    read = read_pairs(tmp_path / "pictures", given.texts)
    np.testing.assert_array_equal(read.reference, given.reference)
    np.testing.assert_array_equal(read.candidate, given.candidate)


def test_pairs_come_worst_first_with_their_place_among_the_prompts() -> None:
    shown = shown_pairs(pairs(4), [30.0, 20.0, None, 40.0])
    assert [pair["index"] for pair in shown] == [2, 1, 0, 3]  # what is not a number is worst
    assert shown[1]["text"] == "prompt 1"
    np.testing.assert_array_equal(np.asarray(opened(shown[1]["reference"])), pairs(4).reference[1])


def test_of_many_pairs_the_worst_the_best_and_some_between_are_shown() -> None:
    psnr = [float(value) for value in np.random.default_rng(1).permutation(3 * MOST_PAIRS)]
    shown = [pair["psnr"] for pair in shown_pairs(pairs(3 * MOST_PAIRS), psnr)]
    assert len(set(shown)) == MOST_PAIRS
    assert shown == sorted(shown)
    assert (shown[0], shown[-1]) == (0.0, 3 * MOST_PAIRS - 1)


def test_the_difference_is_absolute_amplified_and_cut() -> None:
    black = np.zeros((1, 2, 3), np.uint8)
    other = np.array([[[1, 2, 3], [100, 0, 15]]], np.uint8)
    expected = [[[AMPLIFICATION, 2 * AMPLIFICATION, 3 * AMPLIFICATION], [255, 0, 15 * AMPLIFICATION]]]
    assert difference(black, other).tolist() == expected
    assert difference(other, black).tolist() == expected


@pytest.mark.parametrize(("side", "form", "shown"), [(64, "PNG", 64), (512, "JPEG", 192)])
def test_large_pictures_are_shown_smaller(side: int, form: str, shown: int) -> None:
    picture = opened(thumbnail(pairs(1, side).reference[0]))
    assert (picture.format, picture.size) == (form, (shown, shown))
