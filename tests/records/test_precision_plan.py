from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from s2p_deploy.errors import InputError
from s2p_deploy.numerics import format_by_name
from s2p_deploy.recipe import FormatName
from s2p_deploy.records import ActivationQuantizer, LayerPlan, PrecisionPlan
from s2p_deploy.records.precision_plan import ActFormat, WeightFormat, read_plan, write_plan

PLAN = PrecisionPlan(
    layers=(
        LayerPlan("conv_in", "conv", "int8", None, "conv_in"),
        LayerPlan("attn1.to_q", "linear", "int4", "attn1.to_q:int8", "default", 1.25e-9),
        LayerPlan("attn1.to_k", "linear", "int4", "attn1.to_q:int8", "default"),
    ),
    activation_quantizers=(ActivationQuantizer("attn1.to_q:int8", "int8", ("attn1.to_q", "attn1.to_k")),),
)


def test_round_trip(tmp_path: Path) -> None:
    write_plan(PLAN, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == PLAN
    assert PLAN.quantizer("attn1.to_q:int8").layers == ("attn1.to_q", "attn1.to_k")
    assert PLAN.quantizer_names() == ("attn1.to_q:int8",)


@pytest.mark.parametrize(
    "text", ["", "a: [", "layers: {}", "layers: 3\nact_points: {}", "layers: {a: {op: conv}}\nact_points: {}", "[]"]
)
def test_a_foreign_file_is_no_plan(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(InputError, match="no precision plan"):
        read_plan(tmp_path / "plan.yaml")


GOOD = """
activation_quantizers:
  a: {activations: int8, timestep_dependent: true}
layers:
  a: {op: conv, weights: int4, activation_quantizer: a, rule: default, sensitivity: 1.5}
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("weights: int4", "weights: int5", "layers.a.weights: input should be 'int8', 'int4'"),
        (
            "activations: int8",
            "activations: none",
            "activation_quantizers.a.activations: input should be 'int8' or 'int4'",
        ),
        ("activations: int8", "activations: levels3", "activation_quantizers.a.activations"),
        ("op: conv", "op: pool", "layers.a.op"),
        ("timestep_dependent: true", "timestep_dependent: maybe", "dependent: input should be a valid boolean"),
        ("sensitivity: 1.5", "sensitivity: high", "layers.a.sensitivity"),
        ("sensitivity: 1.5", "sensitivity: .nan", "layers.a.sensitivity"),
        ("rule: default", "rule: [1]", "layers.a.rule"),
        ("rule: default", "rule: default, bits: 4", "layers.a.bits: unknown key"),
        ("activation_quantizer: a", "activation_quantizer: 3", "layers.a.activation_quantizer"),
        ("activation_quantizer: a, ", "", "activation quantizer a is used by no layer"),
        (
            "activation_quantizer: a",
            "activation_quantizer: b",
            "activation quantizer b is used by a layer and not defined",
        ),
        ("  a: {op: conv", "  3: {op: conv", "layers.3"),
    ],
)
def test_an_edit_that_cannot_be_meant_is_refused_in_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(GOOD)
    assert read_plan(file).layers[0].sensitivity == 1.5
    assert old in GOOD
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(InputError) as caught:
        read_plan(file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_formats_are_those_of_the_numerics_and_of_recipes() -> None:
    assert get_args(WeightFormat) == get_args(FormatName)
    assert (*get_args(ActFormat), "none") == get_args(FormatName)
    assert all(format_by_name(name) is not None for name in get_args(WeightFormat) if name != "none")


def test_an_act_point_must_be_defined(tmp_path: Path) -> None:
    write_plan(PrecisionPlan(PLAN.layers, ()), tmp_path / "plan.yaml")
    with pytest.raises(InputError, match=r"attn1\.to_q:int8 is used by a layer and not defined"):
        read_plan(tmp_path / "plan.yaml")


def test_nothing_in_a_plan_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    (tmp_path / "plan.yaml").write_text(
        f"layers: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]"
    )
    with pytest.raises(InputError):
        read_plan(tmp_path / "plan.yaml")
    assert not mark.exists()
