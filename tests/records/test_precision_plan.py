from __future__ import annotations

from pathlib import Path

import pytest

from s2p_deploy.errors import InputError
from s2p_deploy.records import ActPoint, PrecisionPlan, SitePlan
from s2p_deploy.records.precision_plan import read_plan, write_plan

PLAN = PrecisionPlan(
    sites=(
        SitePlan("conv_in", "conv", "int8", None, "conv_in"),
        SitePlan("attn1.to_q", "linear", "int4", "attn1.to_q:int8", "default"),
        SitePlan("attn1.to_k", "linear", "int4", "attn1.to_q:int8", "default"),
    ),
    act_points=(ActPoint("attn1.to_q:int8", "int8", ("attn1.to_q", "attn1.to_k")),),
)


def test_round_trip(tmp_path: Path) -> None:
    write_plan(PLAN, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == PLAN
    assert PLAN.point("attn1.to_q:int8").sites == ("attn1.to_q", "attn1.to_k")
    assert PLAN.point_names() == ("attn1.to_q:int8",)


@pytest.mark.parametrize(
    "text", ["", "a: [", "sites: {}", "sites: 3\nact_points: {}", "sites: {a: {op: conv}}\nact_points: {}", "[]"]
)
def test_a_foreign_file_is_no_plan(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(InputError, match="no precision plan"):
        read_plan(tmp_path / "plan.yaml")


def test_an_act_point_must_be_defined(tmp_path: Path) -> None:
    write_plan(PrecisionPlan(PLAN.sites, ()), tmp_path / "plan.yaml")
    with pytest.raises(InputError, match=r"attn1\.to_q:int8 is used by a site and not defined"):
        read_plan(tmp_path / "plan.yaml")


def test_nothing_in_a_plan_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    (tmp_path / "plan.yaml").write_text(
        f"sites: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]"
    )
    with pytest.raises(InputError):
        read_plan(tmp_path / "plan.yaml")
    assert not mark.exists()
