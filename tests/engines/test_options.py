"""Shapes of an optimization profile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest

from s2p_deploy.engines import ShapeProfile, Span
from s2p_deploy.engines.options import MOST_TIMESTEPS, profile_for, profile_shapes, shape_at, spec_of
from s2p_deploy.errors import InputError
from s2p_deploy.records import TensorSpec
from s2p_deploy.records.typed_json import read_value
from tests.engines.small_graph import small_model

if TYPE_CHECKING:
    from tests.engines.conftest import GraphOf

PROFILE = ShapeProfile(1, 2, 8)


def test_rows_stay_fixed_where_the_graph_fixes_them() -> None:
    specs = (TensorSpec("sample", "float16", ("batch", 4, 8, 8)), TensorSpec("act_scales", "float32", (1000, 2)))
    shapes = profile_shapes(specs, PROFILE, timesteps=50)
    assert shapes["sample"] == ((1, 4, 8, 8), (2, 4, 8, 8), (8, 4, 8, 8))
    assert shapes["act_scales"] == ((1000, 2),) * 3


def test_open_rows_span_one_profile() -> None:
    shapes = profile_shapes((TensorSpec("act_scales", "float32", ("timesteps", 2)),), PROFILE, timesteps=1000)
    assert shapes["act_scales"] == ((1, 2), (1000, 2), (MOST_TIMESTEPS, 2))
    table = TensorSpec("act_scales", "float32", ("timesteps", 2))
    crowded = profile_shapes((table,), PROFILE, timesteps=MOST_TIMESTEPS + 1)
    assert crowded["act_scales"][1] == (MOST_TIMESTEPS, 2)


def test_any_other_open_size_is_refused() -> None:
    with pytest.raises(InputError, match="'tokens': only batch and timesteps may be dynamic"):
        profile_shapes((TensorSpec("text", "float16", ("batch", "tokens", 8)),), PROFILE, timesteps=1)
    with pytest.raises(InputError, match="'timesteps': only batch may be dynamic"):
        shape_at(TensorSpec("act_scales", "float32", ("timesteps", 2)), {"batch": 2})


def test_one_profile_spans_batches_heights_and_widths() -> None:
    profile = ShapeProfile(1, 2, 16, Span(64, 64, 128, step=8), Span(64, 96, 128, step=8))
    spec = TensorSpec("sample", "float16", ("batch", 4, "height", "width"))
    assert profile_shapes((spec,), profile, timesteps=1)["sample"] == (
        (1, 4, 64, 64),
        (2, 4, 64, 96),
        (16, 4, 128, 128),
    )
    assert read_value(ShapeProfile, profile.to_json(), Path("profile")) == profile
    assert read_value(ShapeProfile, {"minimum": 1, "optimum": 2, "maximum": 8}, Path("profile")) == PROFILE
    assert PROFILE.to_json() == {"minimum": 1, "optimum": 2, "maximum": 8}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((64, 60, 128), "64:60:128 must be ascending"), ((0, 1, 2), "ascending from 1"), ((64, 68, 128), "68 is no mult")],
)
def test_spans_are_ascending_multiples(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Span(*sizes, step=8)


def test_a_size_outside_the_profile_is_refused_with_what_it_spans() -> None:
    profile = ShapeProfile(1, 2, 16, Span(64, 64, 128, step=8), Span(64, 64, 64, step=8))
    profile.check_latents(72, 64)
    for height, width in ((68, 64), (136, 64), (64, 72), (56, 64)):
        with pytest.raises(InputError, match=f"height 64 to 128 in steps of 8 and width 64, got {height}x{width}"):
            profile.check_latents(height, width)
    PROFILE.check_latents(1, 1)  # nothing to say of a graph of one size: its shapes are fixed


def test_a_graph_of_one_size_has_no_heights(graph_of: GraphOf) -> None:
    graph = graph_of("fp32", "int8")
    assert profile_for(graph, PROFILE) is PROFILE
    with pytest.raises(InputError, match="takes latents of one size: export it with --sizes dynamic"):
        profile_for(graph, ShapeProfile(height=Span(8, 8, 16)))


def test_a_graph_of_open_sizes_is_built_for_the_trained_one_unless_asked_otherwise(graph_of: GraphOf) -> None:
    fixed = graph_of("fp32", "int8")
    content = fixed.manifest.content | {"latents": {"height": 64, "width": 96, "multiple": 8, "largest": 256}}
    graph = replace(fixed, manifest=replace(fixed.manifest, content=content))
    found = profile_for(graph, ShapeProfile(1, 2, 4, height=Span(32, 64, 128)))
    assert found == ShapeProfile(1, 2, 4, Span(32, 64, 128, step=8), Span(96, 96, 96, step=8))
    with pytest.raises(InputError, match="33 is no multiple of 8"):
        profile_for(graph, ShapeProfile(width=Span(33, 40, 48)))
    with pytest.raises(InputError, match="264 is above 256, the most that this network has positions for"):
        profile_for(graph, ShapeProfile(width=Span(64, 64, 264)))


def test_a_graphs_inputs_are_read_from_its_onnx() -> None:
    specs = {spec.name: spec.shape for spec in map(spec_of, ir.from_proto(small_model()).graph.inputs)}
    assert specs["sample"] == ("batch", 4, 8, 8)
    assert specs["act_scales"] == (1000, 2)
