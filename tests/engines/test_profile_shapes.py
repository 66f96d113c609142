"""Shapes of an optimization profile."""

from __future__ import annotations

import pytest

from s2p_deploy.engines import ShapeProfile
from s2p_deploy.engines.profile_shapes import MOST_ROWS, profile_shapes, spec_of
from s2p_deploy.errors import InputError
from s2p_deploy.records import TensorSpec
from tests.engines.small_graph import small_model

PROFILE = ShapeProfile(1, 2, 8)


def test_rows_stay_fixed_where_the_graph_fixes_them() -> None:
    specs = (TensorSpec("sample", "float16", ("batch", 4, 8, 8)), TensorSpec("act_scales", "float32", (1000, 2)))
    shapes = profile_shapes(specs, PROFILE, rows=50)
    assert shapes["sample"] == ((1, 4, 8, 8), (2, 4, 8, 8), (8, 4, 8, 8))
    assert shapes["act_scales"] == ((1000, 2),) * 3


def test_open_rows_span_one_profile() -> None:
    shapes = profile_shapes((TensorSpec("act_scales", "float32", ("rows", 2)),), PROFILE, rows=1000)
    assert shapes["act_scales"] == ((1, 2), (1000, 2), (MOST_ROWS, 2))
    crowded = profile_shapes((TensorSpec("act_scales", "float32", ("rows", 2)),), PROFILE, rows=MOST_ROWS + 1)
    assert crowded["act_scales"][1] == (MOST_ROWS, 2)


def test_any_other_open_size_is_refused() -> None:
    with pytest.raises(InputError, match="'tokens': only batch and rows may be dynamic"):
        profile_shapes((TensorSpec("text", "float16", ("batch", "tokens", 8)),), PROFILE, rows=1)
    with pytest.raises(InputError, match="'rows': only batch may be dynamic"):
        PROFILE.shape(TensorSpec("act_scales", "float32", ("rows", 2)), 2)


def test_a_graphs_inputs_are_read_from_its_onnx() -> None:
    specs = {spec.name: spec.shape for spec in map(spec_of, small_model().graph.input)}
    assert specs["sample"] == ("batch", 4, 8, 8)
    assert specs["act_scales"] == (1000, 2)
