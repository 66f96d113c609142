"""LoRAs put into a calibrated model: equal to a calibration of the fused pipeline, and what was trained is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from s2p_deploy.calib import adapt, calibrate
from s2p_deploy.calib.fused_pipeline import fuse_loras, fused_loras
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families import BasePipeline, resolve_base
from s2p_deploy.families.checkpoint import Checkpoint
from s2p_deploy.families.lora import GivenLora
from s2p_deploy.numerics import format_by_name, least_squares_weight_scale
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import CalibratedModel, PromptSet
from tests.random_loras import in_peft, random_layers, write_lora
from tests.small_pipelines import sibling

MID = "mid_block.attentions.0.transformer_blocks.0"
SHORTCUT = "up_blocks.0.resnets.0.conv_shortcut"
PATHS = [f"{MID}.attn1.to_q", f"{MID}.ff.net.2", "mid_block.resnets.0.conv2", "conv_in", SHORTCUT]
SMALL = {
    "sampling": {"steps": 2},
    "dataset": {"prompts": 1, "samples_per_prompt": 9, "width": 1},
    "scales": {"latents": 1},
}


def fused_with(base: BasePipeline, folder: Path, paths: list[str]) -> BasePipeline:
    component = base.denoiser_folder.name
    file = write_lora(folder / "ink.safetensors", in_peft(random_layers(base, {component: paths})))
    return fuse_loras(base, [GivenLora(file, 0.7)], folder)


def assert_same_weights(found: CalibratedModel, expected: CalibratedModel) -> None:
    for one, other in ((found.weights(), expected.weights()), (found.weight_scales(), expected.weight_scales())):
        assert one.keys() == other.keys()
        assert [name for name in one if not np.array_equal(one[name], other[name])] == []


def test_an_untrained_model_is_that_of_the_fused_pipeline(
    base: BasePipeline, prompts: PromptSet, tmp_path: Path
) -> None:
    overrides = {"weights": "int4", "transforms": {"split_shortcut": "all", "shift": "channel"}}
    calibrated = calibrate(base, Recipe.load("ptq", SMALL | overrides), prompts, tmp_path / "calib")
    fused = fused_with(base, tmp_path, PATHS)
    adapted = adapt(calibrated, base, fused, tmp_path / "adapted")
    given = Recipe.load("ptq", SMALL | overrides | {"scales": {"latents": 1, "activations": "given"}})
    expected = calibrate(fused, given, None, tmp_path / "expected", initial=calibrated)
    assert SHORTCUT in expected.transforms.split
    assert expected.transforms.shifted
    assert expected.transforms.shifted_norms
    assert_same_weights(adapted, expected)
    assert (adapted.plan, adapted.transforms) == (calibrated.plan, calibrated.transforms)
    np.testing.assert_array_equal(adapted.scales.scales, calibrated.scales.scales)
    np.testing.assert_array_equal(adapted.time_table().projections, calibrated.time_table().projections)


def test_what_was_trained_is_kept(base: BasePipeline, prompts: PromptSet, recipe: Recipe, tmp_path: Path) -> None:
    calibrated = calibrate(base, recipe, prompts, tmp_path / "calib")
    fused = fused_with(base, tmp_path, PATHS[:3])
    adapted = adapt(calibrated, base, fused, tmp_path / "adapted")
    plain, changed = Checkpoint(base.denoiser_folder), Checkpoint(fused.denoiser_folder)
    before, after = calibrated.weights(), adapted.weights()
    scales_before, scales_after = calibrated.weight_scales(), adapted.weight_scales()
    for layer in calibrated.plan.layers:
        name, fmt = f"network.{layer.name}.weight", format_by_name(layer.weights)
        assert fmt is not None
        if layer.name not in PATHS[:3]:
            assert np.array_equal(after[name], before[name])
            assert np.array_equal(scales_after[layer.name], scales_before[layer.name])
            continue
        learnt = before[name] - plain.read(f"{layer.name}.weight").numpy()
        assert np.abs(learnt).max() > 0
        np.testing.assert_allclose(after[name], changed.read(f"{layer.name}.weight").numpy() + learnt, atol=1e-7)
        expected = least_squares_weight_scale(torch.from_numpy(after[name]), fmt)
        np.testing.assert_allclose(scales_after[layer.name], expected.numpy(), rtol=1e-6)
    content = adapted.manifest.content
    assert content["adapted"] == sorted(PATHS[:3])
    assert content["request"]["fused LoRAs"] == fused_loras(fused)
    assert adapted.manifest.parents["adapted_from"].digest == calibrated.manifest.digest
    with pytest.raises(InputError, match="differs in initial model"):
        calibrate(fused, recipe, prompts, tmp_path / "adapted")
    assert adapted.manifest.base == fused.base
    assert {"training", "dataset"} & content.keys() == set()


def test_a_time_path_with_a_lora_gives_another_time_table(base: BasePipeline, tmp_path: Path) -> None:
    streamed = Recipe.load("ptq-stream", {"sampling": {"steps": 2}})
    calibrated = calibrate(base, streamed, None, tmp_path / "calib")
    fused = fused_with(base, tmp_path, ["mid_block.resnets.0.time_emb_proj", "time_embedding.linear_2"])
    adapted = adapt(calibrated, base, fused, tmp_path / "adapted")
    expected = calibrate(fused, streamed, None, tmp_path / "expected")
    np.testing.assert_array_equal(adapted.time_table().projections, expected.time_table().projections)
    assert not np.array_equal(adapted.time_table().projections, calibrated.time_table().projections)
    assert_same_weights(adapted, expected)


@pytest.mark.slow
def test_smoothed_layers_are_adapted_behind_their_factors(
    base: BasePipeline, prompts: PromptSet, tmp_path: Path
) -> None:
    scales = {"latents": 1, "calibrator": "modelopt_smoothquant"}
    overrides = SMALL | {"scales": scales, "transforms": {"shift": "none"}}
    calibrated = calibrate(base, Recipe.load("ptq", overrides), prompts, tmp_path / "calib")
    path = f"{MID}.attn1.to_q"
    assert path in calibrated.transforms.smoothed
    fused = fused_with(base, tmp_path, [path])
    adapted = adapt(calibrated, base, fused, tmp_path / "adapted")
    factor, weight = (adapted.tensor(f"network.{path}.{name}") for name in ("factor", "layer.weight"))
    expected = Checkpoint(fused.denoiser_folder).read(f"{path}.weight").numpy()
    np.testing.assert_allclose(weight / factor, expected, rtol=1e-5, atol=1e-6)
    scale = np.abs(weight).max(1, keepdims=True) / 127  # modelopt's scales are of the largest magnitudes
    np.testing.assert_allclose(adapted.weight_scales()[f"{path}.layer"], scale, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_siblings_are_adapted_with_their_time_paths(tmp_path: Path, name: str) -> None:
    base, streamed = sibling(name), Recipe.load("ptq-stream", {"sampling": {"steps": 2}})
    calibrated = calibrate(base, streamed, None, tmp_path / "calib")
    tensors = Checkpoint(base.denoiser_folder).tensors
    linear = [key.removesuffix(".weight") for key, stored in tensors.items() if len(stored.shape) == 2]
    fused = fused_with(base, tmp_path, [path for path in linear if path != "pos_embed.pos_embed"])
    adapted = adapt(calibrated, base, fused, tmp_path / "adapted")
    assert_same_weights(adapted, calibrate(fused, streamed, None, tmp_path / "expected"))


def test_another_pipeline_and_a_folder_that_is_there_are_refused(base: BasePipeline, tmp_path: Path) -> None:
    calibrated = calibrate(base, Recipe.load("fp", {"sampling": {"steps": 2}}), None, tmp_path / "calib")
    fused = fused_with(base, tmp_path, PATHS[:1])
    with pytest.raises(IntegrityError, match="not the pipeline that this artifact was made from"):
        adapt(calibrated, resolve_base("shapes"), fused, tmp_path / "adapted")
    with pytest.raises(InputError, match="is the calibrated model that is read: choose another --out"):
        adapt(calibrated, base, fused, tmp_path / "calib")
    again = adapt(calibrated, base, fused, tmp_path / "adapted")
    assert again.manifest == adapt(calibrated, base, fused, tmp_path / "adapted", replace=True).manifest
    twice = adapt(
        again, fused, fuse_loras(fused, [GivenLora(tmp_path / "ink.safetensors", 0.1)], tmp_path), tmp_path / "2"
    )
    assert len(twice.manifest.content["request"]["fused LoRAs"]) == 2
