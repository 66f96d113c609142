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
from s2p_deploy.records import Number, Skipped
from s2p_deploy.validation.measurements import (
    Agreement,
    BlockAgreement,
    EndToEnd,
    Floats,
    Floor,
    Integers,
    Measurements,
    Perceptual,
    PictureComparison,
    QuantizerCodes,
    Similarity,
    from_json,
    to_json,
)

PATH = Path("measurements.json")
ANY_FLOAT = st.floats(width=64)
COUNTS = st.integers(0, 2**62)


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
    quantizers=st.lists(st.builds(QuantizerCodes, st.text(), ANY_FLOAT, st.integers(0, 9), st.integers(0, 9))).map(
        tuple
    )
    | SKIPPED,
    graph_blocks=st.lists(st.builds(BlockAgreement, st.text(), ANY_FLOAT, COUNTS)).map(tuple) | SKIPPED,
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
    again = from_json(Measurements, to_json(Measurements, found).encode(), PATH)
    np.testing.assert_equal(plainly(again), plainly(found))


def test_it_is_strict_json_with_types_and_bits_kept() -> None:
    numbers = np.array([np.nan, -np.inf, -0.0, 0.1 + 0.2, 5e-324])
    text = to_json(Similarity, Similarity(numbers, numbers, numbers))
    assert json.loads(text, parse_constant=pytest.fail)["psnr"]["values"][:2] == ["NaN", "-Infinity"]
    again = from_json(Similarity, text.encode(), PATH)
    assert again.psnr.tobytes() == numbers.tobytes()


GOOD = {"quantizer": "a", "mismatch": 0.5, "max_lsb": 1, "n": 8}
ARRAY = {"shape": [2], "values": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("kind", "value", "where"),
    [
        (QuantizerCodes, GOOD | {"n": 8.5}, "n: input should be a valid integer"),
        (QuantizerCodes, GOOD | {"mismatch": "many"}, "mismatch: input should be a valid number"),
        (QuantizerCodes, {"quantizer": "a"}, "mismatch: field required"),
        (QuantizerCodes, [], "the file: "),
        (tuple[QuantizerCodes, ...], GOOD, "the file: "),
        (tuple[QuantizerCodes, ...], [GOOD, 3], "1: "),
        (Floats, ARRAY | {"shape": [3]}, "cannot reshape"),
        (Floats, ARRAY | {"values": [1.0, [2.0]]}, "values.1: input should be a valid number"),
        (Integers, ARRAY | {"values": [1, 2**70]}, "cannot hold a value"),
        (Integers, ARRAY | {"values": [1, 2.5]}, "values.1: input should be a valid integer"),
        (Number | Skipped, {"other": 1}, "field required"),
    ],
)
def test_what_is_damaged_is_refused_in_one_line(kind: object, value: object, where: str) -> None:
    with pytest.raises(IntegrityError, match=where) as refused:
        from_json(kind, json.dumps(value).encode(), PATH)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b'{"quantizer": NaN}', b"1e999"])
def test_what_is_no_such_json_is_refused(text: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"measurements\.json"):
        from_json(QuantizerCodes, text, PATH)


def plainly(value: object) -> object:
    """Records as dictionaries, arrays with their types, for a comparison that takes nan for nan."""
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "values": value}
    if isinstance(value, tuple):
        return [type(value).__name__, *map(plainly, value)]
    if hasattr(value, "__dataclass_fields__"):
        return {"record": type(value).__name__} | {name: plainly(item) for name, item in vars(value).items()}
    return value
