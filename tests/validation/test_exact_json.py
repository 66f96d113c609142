from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from s2p_deploy.errors import IntegrityError
from s2p_deploy.pipeline import Schedule
from s2p_deploy.validation.exact_json import exact_text, exact_value
from s2p_deploy.validation.measurements import (
    Agreement,
    BlockAgreement,
    EndToEnd,
    Floor,
    Measurements,
    Perceptual,
    PictureComparison,
    PointCodes,
    Similarity,
)
from s2p_deploy.validation.numbers import Number, Skipped

PATH = Path("measurements.json")
ANY_FLOAT = st.floats(width=64)


def many(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    return arrays(np.float64, shape, elements=ANY_FLOAT)


NUMBERS = st.builds(Number, ANY_FLOAT, st.integers(0, 10**6), st.none() | ANY_FLOAT, st.none() | ANY_FLOAT)
SKIPPED = st.builds(Skipped, st.text())
SIMILARITY = st.builds(Similarity, many((3,)), many((3,)), many((3,)))
PICTURES = st.builds(
    PictureComparison,
    schedule=st.builds(Schedule, st.integers(1, 50), st.none() | st.text(), size=st.none() | st.just((64, 96))),
    guidance_scale=ANY_FLOAT,
    similarity=SIMILARITY,
    pixel_shift=SIMILARITY,
    timesteps=st.lists(ANY_FLOAT).map(tuple),
    step_error=many((2, 3)) | many((0, 3)),
    accuracy=st.tuples(NUMBERS, NUMBERS) | SKIPPED,
    feature_distance=NUMBERS | SKIPPED,
    seconds=st.tuples(ANY_FLOAT, ANY_FLOAT),
)
MEASUREMENTS = st.builds(
    Measurements,
    quantized=st.booleans(),
    graph_half=st.booleans(),
    engine_half=st.booleans(),
    points=st.lists(st.builds(PointCodes, st.text(), ANY_FLOAT, st.integers(), st.integers())).map(tuple) | SKIPPED,
    graph_blocks=st.lists(st.builds(BlockAgreement, st.text(), ANY_FLOAT, st.integers())).map(tuple) | SKIPPED,
    engine_blocks=SKIPPED,
    end_to_end=st.builds(
        EndToEnd,
        arrays(np.int64, 4),
        many((4,)),
        many((4,)),
        many((4,)),
        many((4,)),
        ANY_FLOAT,
        cosines=st.none() | many((2, 4)),
    )
    | SKIPPED,
    pictures=PICTURES | SKIPPED,
    other_schedules=st.lists(PICTURES, max_size=2).map(tuple),
    floors=st.lists(st.builds(Floor, st.text(), st.builds(Agreement, many((2,)), many((2,))) | SKIPPED)).map(tuple),
    perceptual=st.builds(
        Perceptual,
        lpips=many((3,)) | SKIPPED,
        fid=NUMBERS | SKIPPED,
        sfid=SKIPPED,
        fid_clip=SKIPPED,
        clip_score=many((2, 3)) | SKIPPED,
    )
    | SKIPPED,
)


@given(MEASUREMENTS)
def test_measurements_read_back_exactly(found: Measurements) -> None:
    again = exact_value(Measurements, exact_text(found).encode(), PATH)
    np.testing.assert_equal(plainly(again), plainly(found))


def test_it_is_strict_json_with_types_and_bits_kept() -> None:
    numbers = np.array([np.nan, -np.inf, -0.0, 0.1 + 0.2, 5e-324])
    text = exact_text(Similarity(numbers, numbers, numbers))
    assert json.loads(text, parse_constant=pytest.fail)["psnr"]["dtype"] == "float64"
    again = exact_value(Similarity, text.encode(), PATH)
    assert again.psnr.tobytes() == numbers.tobytes()


GOOD = {"record": "PointCodes", "point": "a", "mismatch": 0.5, "max_lsb": 1, "n": 8}
ARRAY = {"dtype": "float64", "shape": [2], "values": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (PointCodes, GOOD | {"n": 8.0}, "the file.n is no int"),
        (PointCodes, GOOD | {"n": True}, "the file.n is no int"),
        (PointCodes, GOOD | {"mismatch": "0.5"}, "the file.mismatch is no number"),
        (PointCodes, GOOD | {"record": "Number"}, "is no PointCodes"),
        (PointCodes, GOOD | {"more": 1}, "the file.more is unknown"),
        (PointCodes, {key: GOOD[key] for key in ("record", "point", "n")}, "the file.mismatch is missing"),
        (PointCodes, [], "the file is no object"),
        (tuple[PointCodes, ...], GOOD, "the file is no list"),
        (tuple[PointCodes, ...], [GOOD, 3], "the file.1 is no object"),
        (tuple[float, float], [1.0], "has 1 items, expected 2"),
        (np.ndarray[Any, np.dtype[np.float64]], ARRAY | {"dtype": "float32"}, "no array of float64"),
        (np.ndarray[Any, np.dtype[np.float64]], ARRAY | {"shape": [3]}, "not as many values"),
        (np.ndarray[Any, np.dtype[np.float64]], ARRAY | {"shape": [-1, -2]}, "not as many values"),
        (np.ndarray[Any, np.dtype[np.float64]], ARRAY | {"values": [1.0, [2.0]]}, "is no number"),
        (np.ndarray[Any, np.dtype[np.int64]], ARRAY | {"dtype": "int64", "values": [1, 2**70]}, "cannot hold"),
        (Number | Skipped, {"record": "Other"}, "none of what it can be"),
        (Number | None, [1], "none of what it can be"),
        (str | float, {}, "none of what it can be"),
    ],
)
def test_what_is_damaged_is_refused_in_one_line(kind: object, value: object, words: str) -> None:
    with pytest.raises(IntegrityError, match=words) as refused:
        exact_value(kind, json.dumps(value).encode(), PATH)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b'{"record": NaN}', b"1e999"])
def test_what_is_no_such_json_is_refused(text: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"measurements\.json"):
        exact_value(PointCodes, text, PATH)


def plainly(value: object) -> object:
    """Records as dictionaries, arrays with their types, for a comparison that takes nan for nan."""
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "values": value}
    if isinstance(value, tuple):
        return [type(value).__name__, *map(plainly, value)]
    if hasattr(value, "__dataclass_fields__"):
        return {"record": type(value).__name__} | {name: plainly(item) for name, item in vars(value).items()}
    return value
