from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2p_deploy.calib import Hooks, calibrate, fake_quant_denoiser, fp_denoiser
from s2p_deploy.calib.training import cosine
from s2p_deploy.context import Context, silent
from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import CalibratedModel, LatentDataset, Prompt, PromptSet, parent_folder

ReadFiles = Callable[[Path], dict[str, bytes]]

# argv: pipeline, recipe as JSON, prompts as JSON, out, stage, count. Kills itself without warning inside the stage.
KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from s2p_deploy.calib import calibrate
from s2p_deploy.context import Context
from s2p_deploy.families import resolve_base
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import Prompt, PromptSet

def kill(stage, done, total):
    if stage == sys.argv[5] and done >= int(sys.argv[6]):
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
recipe = recipe_from_data(json.loads(sys.argv[2]), "test")
prompts = PromptSet(tuple(Prompt(*prompt) for prompt in json.loads(sys.argv[3])))
calibrate(resolve_base(sys.argv[1]), recipe, prompts, Path(sys.argv[4]), context=Context(progress=kill))
"""


@pytest.fixture(scope="module")
def finished(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, tmp_path_factory: pytest.TempPathFactory
) -> CalibratedModel:
    torch.set_num_threads(1)  # as in the tests, which run after this
    return calibrate(base, recipe, prompts, tmp_path_factory.mktemp("whole") / "model")


def test_what_a_calibrated_model_holds(finished: CalibratedModel, prompts: PromptSet, recipe: Recipe) -> None:
    table = finished.scales
    assert table.scales.shape == (1000, len(finished.plan.activation_quantizers))
    assert table.calibrated == finished.timesteps.calibrated
    assert len(table.calibrated) == 6
    content = finished.manifest.content
    assert content["request"]["prompts"] == prompts.digest
    assert content["tokens"] == finished.tokens == 24
    training = content["training"]
    assert training["starting_loss"] == pytest.approx(1.0)
    assert training["timestep_indices"] == list(table.calibrated)
    assert len(training["errors_start"]) == len(training["errors_final"]) == 6
    assert 4 < content["average_bits"]["parameters"]["weights"] < 4.1
    assert 8 < content["average_bits"]["parameters"]["activations"] < 10
    assert [line["kind"] for line in _log(finished.folder)].count("iteration") == recipe.training.iterations


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def test_the_dataset_is_inside_and_verified(finished: CalibratedModel) -> None:
    folder = parent_folder(finished.folder, finished.manifest, "dataset")
    assert folder.resolve() == (finished.folder / "dataset").resolve()
    dataset = LatentDataset.open(folder)
    assert dataset.manifest.digest == finished.manifest.content["dataset"]
    assert not finished.folder.with_name("model.partial").exists()


@torch.no_grad()
def test_the_reference_has_the_stored_error(finished: CalibratedModel) -> None:
    dataset = LatentDataset.open(finished.folder / "dataset")
    reference = fake_quant_denoiser(finished)
    rows = torch.from_numpy(dataset.timestep_indices)
    errors = []
    for texts, targets in ((dataset.uncond_text, dataset.uncond), (dataset.cond_text, dataset.cond)):
        states = torch.from_numpy(dataset.texts[texts[dataset.prompt]]).float()
        output = reference(torch.from_numpy(dataset.latents[:]).float(), rows, states)
        errors.append((output - torch.from_numpy(targets[:]).float()).square().mean((1, 2, 3)))
    mean = torch.stack(errors).mean(0).numpy()
    by_row = [mean[dataset.timestep_indices == row].mean() for row in finished.timesteps.calibrated]
    np.testing.assert_allclose(by_row, finished.manifest.content["training"]["errors_final"], rtol=0.05)


def test_a_second_start_returns_the_finished_model(
    finished: CalibratedModel, base: BasePipeline, recipe: Recipe, prompts: PromptSet
) -> None:
    def refuse(stage: str, done: int, total: int) -> None:
        pytest.fail(f"{stage} ran again")

    again = calibrate(base, recipe, prompts, finished.folder, context=Context(progress=refuse))
    assert again.manifest.digest == finished.manifest.digest


class AlwaysFull:
    """A learning rate that is no function."""

    def __call__(self, iteration: int, iterations: int) -> float:
        del iteration, iterations
        return 1.0


def test_another_request_is_refused_unless_replaced(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"iterations": 0})})
    first = calibrate(base, recipe, prompts.first(2), out)
    with pytest.raises(InputError, match=r"was made by another request \(it differs in prompts\)"):
        calibrate(base, recipe, prompts.first(3), out)
    shifted = Hooks(learning_rate=lambda iteration, iterations: 1.0)
    assert Hooks().replaced() == {}
    assert Hooks(learning_rate=partial(cosine), loss=print).replaced() == {  # type: ignore[arg-type]
        "learning_rate": "s2p_deploy.calib.training.cosine",
        "loss": "builtins.print",
    }
    assert Hooks(learning_rate=AlwaysFull()).replaced()["learning_rate"].endswith(".AlwaysFull")
    with pytest.raises(InputError, match="it differs in hooks"):
        calibrate(base, recipe, prompts.first(2), out, hooks=shifted)
    second = calibrate(base, recipe, prompts.first(3), out, replace=True)
    assert second.manifest.digest != first.manifest.digest
    assert second.manifest.content["training"]["final_loss"] == pytest.approx(1.0)


def test_unfinished_work_of_another_request_is_refused_unless_replaced(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, tmp_path: Path
) -> None:
    out = tmp_path / "model"

    with pytest.raises(KeyboardInterrupt):
        calibrate(base, recipe, prompts.first(2), out, context=Context(progress=interrupt))
    other = recipe.model_copy(update={"training": recipe.training.model_copy(update={"iterations": 0})})
    with pytest.raises(InputError, match="holds unfinished work with another recipe"):
        calibrate(base, other, prompts.first(2), out)
    with pytest.raises(InputError, match="holds unfinished work with another arithmetic"):
        calibrate(base, recipe, prompts.first(2), out, context=Context(deterministic=True))
    assert calibrate(base, other, prompts.first(2), out, replace=True).folder == out


def test_an_open_guidance_scale_is_the_pipelines(base: BasePipeline, recipe: Recipe, tmp_path: Path) -> None:
    sampling = recipe.sampling.model_copy(update={"guidance_scale": None})
    fp = Recipe.load("fp").model_copy(update={"sampling": sampling})
    model = calibrate(base, fp, PromptSet((Prompt("a", "a circle"),)), tmp_path / "model")
    assert model.manifest.recipe["sampling"]["guidance_scale"] == base.default_guidance


@torch.no_grad()
def test_recipe_fp_is_the_pipelines_own_denoiser(base: BasePipeline, prompts: PromptSet, tmp_path: Path) -> None:
    model = calibrate(base, Recipe.load("fp"), prompts, tmp_path / "fp", context=Context(progress=silent))
    assert model.scales.scales.shape == (1000, 0)
    assert len(model.timesteps.calibrated) == 50
    assert model.manifest.parents == {}
    assert model.manifest.content["average_bits"]["layers"]["weights"] == 16
    inputs = (torch.ones(2, 4, 8, 8), torch.tensor([3, 981]), torch.ones(2, 24, 128))
    assert torch.equal(fake_quant_denoiser(model)(*inputs), fp_denoiser(base, 50)(*inputs))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(
    *,
    finished: CalibratedModel,
    base: BasePipeline,
    recipe: Recipe,
    prompts: PromptSet,
    file_bytes: ReadFiles,
    tmp_path: Path,
) -> None:
    out = tmp_path / "model"
    texts = json.dumps([[prompt.id, prompt.text] for prompt in prompts.prompts])
    request = [str(base.folder), recipe.model_dump_json(), texts, str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for stage, count, left in (("dataset", 25, "dataset.shards/shard-*"), ("training", 3, "training.safetensors")):
        command = [sys.executable, "-c", KILLED, *request, stage, str(count)]
        run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert not out.exists()
        assert list(out.with_name("model.partial").glob(left))
    calibrate(base, recipe, prompts, out)
    assert file_bytes(out) == file_bytes(finished.folder)


def test_work_that_was_finished_and_not_cleared_away_is_cleared(
    finished: CalibratedModel, base: BasePipeline, recipe: Recipe, prompts: PromptSet, tmp_path: Path
) -> None:
    out, partial = tmp_path / "model", tmp_path / "model.partial"
    with pytest.raises(KeyboardInterrupt):
        calibrate(base, recipe, prompts, out, context=Context(progress=interrupt))
    shutil.copytree(finished.folder, out)
    calibrate(base, recipe, prompts, out)
    assert not partial.exists()


def test_a_plan_that_a_kill_left_half_written_does_not_stop_a_later_start(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kill comes while the plan's file is being written: before it has its name."""
    out = tmp_path / "model"
    fast = recipe.model_copy(update={"training": recipe.training.model_copy(update={"iterations": 0})})

    def killed(self: Path, target: Path) -> Path:
        if target.name == "plan.yaml":
            raise KeyboardInterrupt
        return self.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrate(base, fast, prompts, out)
    assert not (tmp_path / "model.partial" / "plan.yaml").exists()
    assert calibrate(base, fast, prompts, out).plan.layers


def test_the_context_has_the_seed_the_threads_and_the_work_folder(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, tmp_path: Path
) -> None:
    def look(stage: str, done: int, total: int) -> None:
        assert (tmp_path / "work" / "model.partial").is_dir()
        assert torch.get_num_threads() == 2

    fast = recipe.model_copy(update={"training": recipe.training.model_copy(update={"iterations": 0})})
    context = Context(seed=7, threads=2, work=tmp_path / "work", progress=look)
    model = calibrate(base, fast, prompts.first(2), tmp_path / "model", context=context)
    assert model.manifest.recipe["training"]["seed"] == 7
    assert LatentDataset.open(model.folder / "dataset").manifest.content["threads"] == 2
    assert not (tmp_path / "work" / "model.partial").exists()
    assert not (tmp_path / "model.partial").exists()
    again = calibrate(base, fast, prompts.first(2), tmp_path / "model", context=context)
    assert again.manifest.digest == model.manifest.digest
    with pytest.raises(InputError, match="it differs in recipe"):
        calibrate(base, fast, prompts.first(2), tmp_path / "model")


def interrupt(stage: str, done: int, total: int) -> None:
    raise KeyboardInterrupt
