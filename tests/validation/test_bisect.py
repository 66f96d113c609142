from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from s2p_deploy.calib.quantized_denoiser import FakeQuantDenoiser
from s2p_deploy.cli.app import main
from s2p_deploy.families import IndexedDenoiser
from s2p_deploy.records.precision_plan import read_plan, write_plan
from s2p_deploy.validation import Chain
from s2p_deploy.validation.bisect import (
    Bisection,
    Change,
    LayerGain,
    bisect,
    changed_plan,
    plan_bits,
    rules_of,
    suggested,
)
from s2p_deploy.validation.reference import choose_latents, stored_predictions, unquantized_denoiser

BAD = "up_blocks.1.resnets.0.conv1"


@pytest.fixture(scope="module")
def unquantized(chain: Chain) -> IndexedDenoiser:
    return unquantized_denoiser(chain.calibrated)


def bisected(chain: Chain, fake_quant: FakeQuantDenoiser, unquantized: IndexedDenoiser, groups: int = 2) -> Bisection:
    assert chain.dataset is not None
    latents, answers = choose_latents(chain.dataset, 8), stored_predictions(chain.dataset, 8)
    return bisect(fake_quant, unquantized, latents, answers, groups=groups, top=2)


def test_a_planted_defect_is_found_first(
    chain: Chain, fake_quant: FakeQuantDenoiser, unquantized: IndexedDenoiser
) -> None:
    whole = bisected(chain, fake_quant, unquantized).sqnr
    fake_quant.act_scales = fake_quant.act_scales.clone()  # it lies in the chain's memory
    fake_quant.act_scales[:, chain.calibrated.scales.quantizers.index(BAD)] *= 4
    found = bisected(chain, fake_quant, unquantized)
    assert found.sqnr < whole
    assert found.groups[0].name == "up_blocks.1.resnets.0"
    assert found.layers[0].name == BAD
    assert found.changes[0] == Change(BAD, None, "none")  # its weights are right
    assert found.expected > whole
    assert found.layers[0].activations_gain == pytest.approx(found.layers[0].gain, abs=0.5)


def test_every_pass_is_counted_and_nothing_stays_switched(
    chain: Chain, fake_quant: FakeQuantDenoiser, unquantized: IndexedDenoiser
) -> None:
    found = bisected(chain, fake_quant, unquantized, groups=1)
    together = 1 if found.changes else 0
    assert found.passes == 1 + len(found.groups) + len(found.layers) + 2 * 2 + together
    assert not any(module._forward_hooks for module in fake_quant.modules())
    assert bisected(chain, fake_quant, unquantized, groups=1) == found
    quantized = {
        layer.name for layer in chain.calibrated.plan.layers if layer.weights != "none" or layer.activation_quantizer
    }
    assert {layer.name for layer in found.layers} <= quantized


def test_everything_in_floating_point_is_the_model_that_was_quantized(
    chain: Chain, fake_quant: FakeQuantDenoiser, unquantized: IndexedDenoiser
) -> None:
    found = bisected(chain, fake_quant, unquantized)
    assert sum(group.gain for group in found.groups) > 0
    assert found.groups == tuple(sorted(found.groups, key=lambda group: -group.gain))


@pytest.mark.parametrize(
    ("layer", "change"),
    [
        (LayerGain("a", "int8", "int8", 1.0, 0.1, 0.9), Change("a", None, "none")),
        (LayerGain("a", "int4", "int8", 1.0, 0.9, 0.1), Change("a", "int8", None)),
        (LayerGain("a", "int4", "int8", 1.0, 0.6, 0.4), Change("a", "int8", "none")),
        (LayerGain("a", "int8", "int8", 1.0, 0.9, 0.1), Change("a", "none", "none")),
        (LayerGain("a", "int4", "none", 1.0, 1.0, 0.0), Change("a", "int8", None)),
        (LayerGain("a", "int8", "none", 1.0, 1.0, 0.0), Change("a", "none", None)),
        (LayerGain("a", "int4", "int8", 0.1, 0.1, 0.0), None),
    ],
)
def test_the_cheapest_change_that_gains_most_is_suggested(layer: LayerGain, change: Change | None) -> None:
    assert suggested(layer) == change


def test_a_changed_plan_is_one_that_calibrate_takes(chain: Chain, tmp_path: Path) -> None:
    plan = chain.calibrated.plan
    shared = next(point for point in plan.activation_quantizers if len(point.layers) > 1)
    lone = next(point for point in plan.activation_quantizers if len(point.layers) == 1)
    changes = (Change(lone.layers[0], None, "none"), Change(shared.layers[0], "none", "none"))
    changed = changed_plan(plan, changes)
    write_plan(changed, tmp_path / "plan.yaml")
    read = read_plan(tmp_path / "plan.yaml")
    assert lone.name not in read.quantizer_names()
    assert read.quantizer(shared.name).layers == shared.layers[1:]
    by_name = {layer.name: layer for layer in read.layers}
    assert by_name[shared.layers[0]].weights == "none"
    assert by_name[lone.layers[0]].rule == "bisection"
    sizes = {layer.name: 10 for layer in plan.layers}
    before, after = plan_bits(plan, sizes), plan_bits(changed, sizes)
    assert after["weights"] == pytest.approx(before["weights"] + 8 / len(sizes))
    assert after["activations"] == pytest.approx(before["activations"] + 2 * 8 / len(sizes))


def test_the_command_takes_an_engine_and_writes_the_changed_plan(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "new" / "folder" / "plan.yaml"
    command = ["validate", str(chain.engine.folder), "--bisect", "--plan-out", str(plan), "--json"]
    assert main(command) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == "Bisection"
    assert data["layers"][0]["gain"] == max(layer["gain"] for layer in data["layers"])
    assert [rule["match"] for rule in data["rules"]] == [change["name"] for change in data["changes"]]
    assert {"now", "suggested"} == set(data["average_bits"])
    assert [layer.name for layer in read_plan(plan).layers] == [layer.name for layer in chain.calibrated.plan.layers]
    assert main(command) == 2  # the plan is there
    assert main([*command[:3], "--prompts", "shapes:held_out"]) == 2
    assert main(["validate", "--bisect"]) == 2
    assert main(["validate", str(chain.calibrated.folder), "--bisect"]) == 0
    assert "passes over the latents" in capsys.readouterr().out


def test_rules_name_only_what_changes() -> None:
    changes = (Change("a", "int8", None), Change("b", "none", "none"))
    assert rules_of(changes) == [
        {"match": "a", "weights": "int8"},
        {"match": "b", "weights": "none", "activations": "none"},
    ]


def test_stored_answers_belong_to_the_chosen_latents(chain: Chain, unquantized: IndexedDenoiser) -> None:
    assert chain.dataset is not None
    latents, answers = choose_latents(chain.dataset, 8), stored_predictions(chain.dataset, 8)
    found = unquantized(*(torch.from_numpy(value) for value in latents.inputs().values())).numpy()
    np.testing.assert_allclose(found, answers, atol=2e-3 * np.abs(answers).max())
