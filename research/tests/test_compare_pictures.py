from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from s2p_deploy.calib import calibrate
from s2p_deploy.context import silent
from s2p_deploy.engines import TorchRunner
from s2p_deploy.families import BasePipeline, denoiser_of, load_pipeline, with_denoiser
from s2p_deploy.metrics import frechet_distance
from s2p_deploy.numerics import format_by_name
from s2p_deploy.pipeline import EngineUNet, Schedule
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Number, PromptSet, TimestepTable
from s2p_deploy.validation import pictures
from s2p_deploy.validation.compare import float_bytes, quantized_bytes
from s2p_research import comparison_pictures as module
from s2p_research.comparison_pictures import ReferencePictures, Task, compare_pictures, draw_reference
from tests.artifacts import tiny_calibrated
from tests.small_pipelines import sibling, tiny_base

TABLE = TimestepTable("PNDMScheduler", {}, 4, (1, 751), np.linspace(0.1, 1.5, 1000))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BasePipeline:
    return tiny_base(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="module")
def pipe(base: BasePipeline) -> StableDiffusionPipeline:
    return load_pipeline(base)


@pytest.fixture
def reference(
    pipe: StableDiffusionPipeline,
    base: BasePipeline,
    prompts: PromptSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> ReferencePictures:
    """Three pictures in two batches."""
    for place in (pictures, module):
        monkeypatch.setattr(place, "BATCH", 2)
    return draw_reference(pipe, Task(prompts, Schedule(4), 2.5), base.base, tmp_path / "reference", silent)


def test_stored_parts_are_what_was_drawn(
    reference: ReferencePictures, pipe: StableDiffusionPipeline, prompts: PromptSet
) -> None:
    drawn = pictures.generate_pictures(pipe, prompts, Schedule(4), 2.5)
    parts = list(reference.parts())
    assert [len(part.pictures) for part in parts] == [2, 1]
    np.testing.assert_array_equal(np.concatenate([part.pictures for part in parts]), drawn.pictures)
    np.testing.assert_array_equal(np.concatenate([part.trajectory for part in parts], axis=1), drawn.trajectory)
    assert parts[0].timesteps == drawn.timesteps
    np.testing.assert_array_equal(reference.pixel_shift.psnr, pictures.pixel_shift(drawn.pictures).psnr)


def test_figures_are_those_of_both_drawings_at_once(
    reference: ReferencePictures, pipe: StableDiffusionPipeline, base: BasePipeline, prompts: PromptSet, tmp_path: Path
) -> None:
    other = load_pipeline(base).unet
    with torch.no_grad():
        other.conv_out.weight.mul_(1.05)
    found = compare_pictures(reference, pipe, other, keep=tmp_path, progress=silent)
    drawn = [pictures.generate_pictures(one, prompts, Schedule(4), 2.5) for one in (pipe, with_denoiser(pipe, other))]
    whole = pictures.compare_pictures(*drawn, prompts, Schedule(4), 2.5)
    np.testing.assert_allclose(found.psnr_values, whole.similarity.psnr, rtol=1e-6)
    np.testing.assert_allclose(found.step_error.median, np.median(whole.step_error, axis=1), rtol=1e-6)
    assert found.psnr.worst == pytest.approx(whole.similarity.psnr.min())
    assert found.psnr.tenth.value == pytest.approx(np.quantile(whole.similarity.psnr, 0.1))
    assert isinstance(whole.accuracy, tuple)
    assert found.accuracy == whole.accuracy[1]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["00000.png", "00001.png", "00002.png"]


def test_pictures_that_are_no_numbers_are_figures_too(
    reference: ReferencePictures, pipe: StableDiffusionPipeline
) -> None:
    """A recipe that diverged is shown, and is not the best of anything."""
    broken = EngineUNet(TorchRunner(lambda sample, *_: sample * torch.nan), pipe.unet.config, TABLE)
    found = compare_pictures(reference, pipe, broken, keep=None, progress=silent)
    for metric in (found.psnr, found.ssim, found.haarpsi):
        assert math.isnan(metric.median.value)
        assert math.isnan(metric.worst)
    assert isinstance(found.feature_distance, Number)
    assert isinstance(found.accuracy, Number)
    assert found.accuracy.value < 1


def test_the_interval_of_the_distance_holds_its_value() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((300, 64))
    moved = module.ShapeScores(np.ones((300, 2), np.int64), features + 0.3 + 0.3 * rng.standard_normal((300, 64)))
    found = module._distance(module.ShapeScores(moved.attributes, features), moved)
    assert isinstance(found, Number)
    assert found.value == frechet_distance(features, moved.features)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
    assert found.high - found.low < 0.3 * found.value


def test_size_counts_every_tensor_once(tmp_path: Path) -> None:
    plain = tiny_calibrated(tmp_path / "fp", "none", "none", recipe="fp")
    four = tiny_calibrated(tmp_path / "w4a8", "int4", "int8")
    weights = four.weights()
    planned = {f"network.{layer.name}.weight": format_by_name(layer.weights) for layer in four.plan.layers}
    saved = sum(weights[name].size * (2 - fmt.bits / 8) for name, fmt in planned.items() if fmt is not None)
    scales = sum(value.size for value in four.weight_scales().values())
    scales += len(four.scales.calibrated) * len(four.scales.quantizers)
    assert quantized_bytes(plain) - quantized_bytes(four) == saved - 4 * scales
    table = plain.time_table().projections
    assert quantized_bytes(plain) == 2 * (table.size + sum(value.size for value in plain.weights().values()))
    assert float_bytes(torch.nn.Linear(3, 5)) == 2 * (3 * 5 + 5)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_time_path_counts_where_it_stays(name: str, tmp_path: Path) -> None:
    base = sibling(name)
    plain = calibrate(base, Recipe.load("fp"), None, tmp_path / "fp")
    network = denoiser_of(load_pipeline(base))
    fixed = sum(buffer.numel() for buffer in network.buffers())  # such as position embeddings
    assert quantized_bytes(plain) == float_bytes(network) + 2 * fixed
