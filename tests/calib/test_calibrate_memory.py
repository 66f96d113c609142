"""A calibration on a device whose memory is counted: what is chosen, kept on a second start, and refused."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from s2p_deploy.calib import calibrate, dataset_request, generate_dataset, training_fit
from s2p_deploy.calib.memory import SHARE
from s2p_deploy.calib.training_memory import Division, Fit, TrainingTime
from s2p_deploy.calib.trajectories import call_with_zeros, load_float_pipeline
from s2p_deploy.context import Context, Progress, silent
from s2p_deploy.errors import InputError, MissingEnvironmentError
from s2p_deploy.families import BasePipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import PromptSet, read_manifest
from tests.counted_memory import Counted

WHOLE, CHECKPOINTING = (Division(4, 1, checkpointing=checkpointing) for checkpointing in (False, True))


@pytest.fixture(scope="module")
def limit(base: BasePipeline, recipe: Recipe) -> int:
    """So little memory that activations have to be recomputed."""
    fit = training_fit(base, recipe, context=Context(memory_limit=10**9))
    assert fit is not None
    assert fit.division == WHOLE
    return int(fit.bytes / SHARE) - 1000


def stop(stage: str, done: int, total: int) -> None:
    if (stage, done) == ("training", 3):
        raise KeyboardInterrupt


def limited(limit: int | None, progress: Progress = silent, samples_per_call: int | None = None) -> Context:
    return Context(memory_limit=limit, samples_per_call=samples_per_call, progress=progress)


def test_a_training_is_divided_to_fit_and_said_so_before_it_starts(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, limit: int, tmp_path: Path
) -> None:
    estimates: list[object] = []
    model = calibrate(base, recipe, prompts, tmp_path / "a", on_estimate=estimates.append, context=limited(limit))
    fit = estimates[0]
    assert isinstance(fit, Fit)
    assert (fit.division, str(fit).partition(":")[0]) == (CHECKPOINTING, "6 iterations of 4 x 1 with checkpointing")
    time = estimates[1]
    assert isinstance(time, TrainingTime)
    assert re.fullmatch(r"6 iterations of 4 x 1 with checkpointing, about \d+ s", str(time))
    assert time.seconds == pytest.approx(6 * 7 * time.forward_s)
    assert model.manifest.recipe["training"]["checkpointing"] is True
    stated = recipe.with_division(4, 1, checkpointing=True)
    assert calibrate(base, stated, prompts, tmp_path / "b").manifest.files == model.manifest.files
    # finished, it is the model of the same command on a machine of any memory
    assert calibrate(base, recipe, prompts, tmp_path / "a").manifest.digest == model.manifest.digest


@pytest.mark.slow
def test_a_second_start_keeps_what_the_first_chose(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, limit: int, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        calibrate(base, recipe, prompts, out, context=limited(limit, stop, samples_per_call=3))
    for other, named in (
        (limited(limit - 1), "memory limit"),
        (limited(limit, samples_per_call=2), "samples per call"),
    ):
        with pytest.raises(InputError, match=f"unfinished work with another {named}: start it as it was"):
            calibrate(base, recipe, prompts, out, context=other)
    seen: list[tuple[str, int]] = []
    context = limited(limit, lambda stage, done, total: seen.append((stage, done)))
    model = calibrate(base, recipe, prompts, out, context=context)
    assert seen[0] == ("training", 3)
    assert model.manifest.recipe["training"]["checkpointing"] is True
    whole = calibrate(base, recipe, prompts, tmp_path / "whole", context=limited(limit, samples_per_call=3))
    assert whole.manifest.files == model.manifest.files


@pytest.mark.slow
def test_force_chooses_anew(base: BasePipeline, recipe: Recipe, prompts: PromptSet, limit: int, tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        calibrate(base, recipe, prompts, out, context=limited(limit, stop))
    model = calibrate(base, recipe, prompts, out, replace=True, context=limited(10**9))
    assert model.manifest.recipe["training"]["checkpointing"] is False


@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_anything_is_made(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, tmp_path: Path
) -> None:
    with pytest.raises(MissingEnvironmentError, match=r"training takes 0\.0 GiB at 4 x 1 with checkpointing"):
        calibrate(base, recipe, prompts, tmp_path / "model", context=limited(1000))
    assert not (tmp_path / "model.partial").exists()


def test_calls_of_fewer_samples_are_noted_and_change_little(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, tmp_path: Path
) -> None:
    fast = recipe.model_copy(update={"training": recipe.training.model_copy(update={"iterations": 0})})
    whole = calibrate(base, fast, prompts, tmp_path / "whole")
    cut = calibrate(base, fast, prompts, tmp_path / "cut", context=limited(None, samples_per_call=1))
    calls = [
        read_manifest(model.folder / "dataset", "LatentDataset").content["samples_per_call"] for model in (whole, cut)
    ]
    assert calls == [None, 1]
    assert abs(cut.scales.scales / whole.scales.scales - 1).max() < 0.2


def counted(monkeypatch: pytest.MonkeyPatch, module: str, base: BasePipeline, recipe: Recipe, samples: float) -> None:
    """Lets a stage take the CPU for a device whose memory is counted, with room for that many samples of a call."""
    denoiser = load_float_pipeline(base, recipe.sampling.steps).denoiser
    one, two = (Counted(0).most_during(lambda n=n: call_with_zeros(denoiser, 24, n)) for n in (1, 2))  # type: ignore[misc]
    room = one + (samples - 1) * (two - one)
    monkeypatch.setattr(import_module(module), "memory_of", lambda device: Counted(room / SHARE))


def test_a_calibration_measures_what_its_calls_take(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counted(monkeypatch, "s2p_deploy.calib.calibrate", base, recipe, 3.5)
    fast = recipe.model_copy(update={"training": recipe.training.model_copy(update={"iterations": 0})})
    model = calibrate(base, fast, prompts, tmp_path / "model")
    assert read_manifest(model.folder / "dataset", "LatentDataset").content["samples_per_call"] == 2


def test_a_dataset_measures_once_and_keeps_the_number(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    request = dataset_request(base, recipe, prompts, tmp_path / "dataset")
    counted(monkeypatch, "s2p_deploy.calib.dataset", base, recipe, 2.5)
    with pytest.raises(KeyboardInterrupt):
        generate_dataset(request, context=Context("cpu", progress=stop))
    counted(monkeypatch, "s2p_deploy.calib.dataset", base, recipe, 9)  # more is free now
    assert generate_dataset(request, context=Context("cpu")).manifest.content["samples_per_call"] == 2


def test_nothing_is_chosen_where_no_memory_is_counted(base: BasePipeline, recipe: Recipe) -> None:
    assert training_fit(base, recipe, context=Context(device="cpu")) is None
    streamed = Recipe.load("ptq-stream")
    assert training_fit(base, streamed, context=limited(1000)) is None
