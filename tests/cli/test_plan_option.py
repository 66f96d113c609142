"""``calibrate --plan``: an edited plan.yaml decides the formats, and one that cannot be meant is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.cli.commands import Chain, Finished, Run, quick_settings

CONV = "mid_block.resnets.0.conv1.layer"


def calibrate(run: Run, chain: Chain, out: Path, plan: Path) -> Finished:
    options = ("--prompts", chain.prompts, "--out", out, "--plan", plan)
    return run("calibrate", "shapes", "--recipe", "w8a8", *options, *quick_settings("training.iterations=0"), "--json")


def edited(chain: Chain, file: Path, layer: str, **values: str) -> Path:
    plan = yaml.safe_load((chain.calib / "plan.yaml").read_text(encoding="utf-8"))
    plan["layers"].setdefault(layer, {"op": "conv", "weights": "int8", "rule": "mine"}).update(values)
    file.write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
    return file


def test_the_edited_formats_are_those_of_the_model(run: Run, made_chain: Chain, tmp_path: Path) -> None:
    plan = edited(made_chain, tmp_path / "mine.yaml", CONV, weights="int4", rule="mine")
    out = tmp_path / "new" / "calib"
    made = calibrate(run, made_chain, out, plan)
    assert made.code == 0, made.err
    assert yaml.safe_load((out / "plan.yaml").read_text()) == yaml.safe_load(plan.read_text())
    shown = run("inspect", out).out
    assert "int4" in shown
    assert all(word in shown for word in ("Average bits", "parameters", "layers", "input elements", "counts as"))


@pytest.mark.parametrize(
    ("layer", "values", "words"),
    [
        ("conv_in", {"weights": "int5"}, ["layers.conv_in.weights", "int4"]),
        ("conv_inn", {}, ["no layer conv_inn"]),
        ("conv_in", {"op": "linear"}, ["conv_in is a conv"]),
        (
            "mid_block.resnets.0.conv1.layer",
            {"weights": "none"},
            ["mid_block.resnets.0.conv1.layer", "floating-point weights"],
        ),
        ("conv_in", {"activation_quantizer": CONV}, ["do not read one tensor"]),
    ],
)
def test_an_edit_that_cannot_be_meant(
    run: Run, made_chain: Chain, tmp_path: Path, layer: str, values: dict[str, str], words: list[str]
) -> None:
    plan = edited(made_chain, tmp_path / "mine.yaml", layer, **values)
    refused = calibrate(run, made_chain, tmp_path / "calib", plan)
    assert refused.code == 2, refused.err
    assert len(refused.err.splitlines()) == 1
    assert all(word in refused.err for word in words), refused.err
    assert list(tmp_path.glob("calib*")) == [], "nothing is left behind"


def test_a_plan_that_is_not_there(run: Run, made_chain: Chain, tmp_path: Path) -> None:
    refused = calibrate(run, made_chain, tmp_path / "calib", tmp_path / "none.yaml")
    assert refused.code == 2
    assert "none.yaml cannot be read (No such file or directory)" in refused.err
