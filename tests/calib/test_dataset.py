from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from s2p_deploy.calib import dataset_request, generate_dataset
from s2p_deploy.calib.dataset import DatasetRequest, Estimate, write_shards
from s2p_deploy.calib.samples import samples_at
from s2p_deploy.calib.trajectories import FloatPipeline, load_float_pipeline
from s2p_deploy.context import Context
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families import BasePipeline, resolve_base
from s2p_deploy.recipe import Recipe, recipe_from_data
from s2p_deploy.records import LatentDataset, Prompt, PromptSet
from s2p_deploy.records.files import claimed
from s2p_deploy.timesteps import timestep_table_of
from tests.kill_loop import kill_script
from tests.small_pipelines import sibling

ReadFiles = Callable[[Path], dict[str, bytes]]

KILLED = kill_script(
    imports="from s2p_deploy.calib import dataset_request, generate_dataset\n"
    "from s2p_deploy.calib.trajectories import load_float_pipeline",
    setup="source = load_float_pipeline(base, recipe.sampling.steps)",
    work="generate_dataset(dataset_request(base, recipe, prompts, out / 'dataset'), source)",
)


def test_what_a_dataset_holds(dataset: LatentDataset, recipe: Recipe, prompts: PromptSet) -> None:
    assert dataset.latents.shape == dataset.cond.shape == dataset.uncond.shape == (18, 4, 8, 8)
    assert dataset.latents.dtype == np.float16
    assert dataset.prompt.tolist() == [index for index in range(6) for _ in range(3)]
    assert set(dataset.timestep_indices.tolist()) <= set(range(1000))
    assert dataset.texts.shape == (7, 24, 128)  # six prompts and the empty one
    assert dataset.added_cond.shape == (7, 0)
    assert sorted(dataset.manifest.files) == [*(f"shard-{n:05d}.safetensors" for n in range(3)), "texts.safetensors"]
    content = dataset.manifest.content
    assert (content["samples"], content["width"], content["prompts"]) == (18, 2, prompts.digest)
    assert (content["threads"], content["device"]) == (1, "cpu")
    assert content["sampling"] == {"scheduler": "PNDMScheduler", "steps": 6, "guidance_scale": 2.5, "guided": True}
    assert set(dataset.manifest.recipe) == {"sampling", "dataset"}
    assert dataset.manifest.recipe["dataset"] == recipe.dataset.model_dump(mode="json")
    assert [path.name for path in dataset.folder.parent.iterdir()] == ["dataset"]


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_guidance_up_to_1_walks_with_the_prompt_alone(
    guidance: float, base: BasePipeline, recipe: Recipe, prompts: PromptSet, source: FloatPipeline, tmp_path: Path
) -> None:
    """As Turbo and Lightning are deployed: half the calls, no text of an empty prompt, one output per sample."""
    sampling = recipe.sampling.model_copy(update={"guidance_scale": guidance})
    request = dataset_request(base, recipe.model_copy(update={"sampling": sampling}), prompts, tmp_path / "dataset")
    estimates: list[Estimate] = []
    alone = generate_dataset(request, source, on_estimate=estimates.append)
    assert not alone.guided
    assert estimates[0].batch == recipe.dataset.width
    assert len(alone.texts) == len(prompts.prompts)
    assert "uncond" not in load_file(alone.folder / "shard-00000.safetensors")
    pairs = samples_at(alone, np.arange(len(alone.timestep_indices)))
    assert len(pairs.sample) == len(alone.timestep_indices)
    with torch.no_grad():
        found = source.denoiser(*pairs.inputs(torch.arange(len(pairs.sample))))
    torch.testing.assert_close(found, pairs.output, atol=5e-3, rtol=2e-3)  # outputs are stored in float16


def test_recipes_that_agree_in_sampling_and_dataset_share_one(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, source: FloatPipeline, tmp_path: Path
) -> None:
    shared = tmp_path / "dataset"
    first = generate_dataset(dataset_request(base, recipe, prompts.first(2), shared), source)
    other = recipe.model_copy(update={"name": "other", "weights": "int8", "rules": ()})
    again = generate_dataset(dataset_request(base, other, prompts.first(2), shared), source)
    assert again.manifest.digest == first.manifest.digest
    longer = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"steps": 7})})
    with pytest.raises(InputError, match=r"dataset was made from another recipe: choose another --out"):
        generate_dataset(dataset_request(base, longer, prompts.first(2), shared), source)
    with pytest.raises(InputError, match="another prompts"):
        generate_dataset(dataset_request(base, recipe, prompts.first(3), shared), source)


def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(
    *,
    base: BasePipeline,
    source: FloatPipeline,
    prompts: PromptSet,
    recipe: Recipe,
    dataset: LatentDataset,
    file_bytes: ReadFiles,
    tmp_path: Path,
) -> None:
    out = tmp_path / "dataset"
    request = dataset_request(base, recipe, prompts, out)
    shards = tmp_path / "dataset.shards"
    stamps: dict[str, int] = {}

    def interrupt(stage: str, done: int, total: int) -> None:
        stamps.update({path.name: path.stat().st_mtime_ns for path in shards.glob("shard-*")})
        if stamps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_dataset(request, source, context=Context(progress=interrupt))
    assert len(stamps) == 1
    (name, written) = stamps.popitem()
    seen: list[tuple[int, int]] = []
    kept: set[int] = set()

    def watch(stage: str, done: int, total: int) -> None:
        seen.append((done, total))
        kept.add((shards / name).stat().st_mtime_ns)

    generate_dataset(request, source, context=Context(progress=watch))
    assert kept == {written}
    assert seen[0][0] > 0
    assert seen[-1][0] == seen[-1][1]
    assert file_bytes(out) == file_bytes(dataset.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_number_of_ranks_changes_no_byte(
    *,
    base: BasePipeline,
    recipe: Recipe,
    prompts: PromptSet,
    source: FloatPipeline,
    dataset: LatentDataset,
    file_bytes: ReadFiles,
    ranks: int,
    tmp_path: Path,
) -> None:
    """Of four ranks the last has nothing to do: there are three shards. The first one comes last, and merges."""
    request = dataset_request(base, recipe, prompts, tmp_path / "dataset")
    for rank in reversed(range(1, ranks)):
        write_shards(replace(request, rank=rank, ranks=ranks), source)
    generate_dataset(replace(request, ranks=ranks), source)
    assert file_bytes(request.out) == file_bytes(dataset.folder)


def test_another_number_of_ranks_can_go_on(
    *,
    base: BasePipeline,
    recipe: Recipe,
    prompts: PromptSet,
    source: FloatPipeline,
    dataset: LatentDataset,
    file_bytes: ReadFiles,
    tmp_path: Path,
) -> None:
    request = dataset_request(base, recipe, prompts, tmp_path / "dataset")
    write_shards(replace(request, rank=1, ranks=2), source)
    generate_dataset(request, source)
    assert file_bytes(request.out) == file_bytes(dataset.folder)


@pytest.mark.slow
def test_kernels_of_full_size_know_no_neighbors_either(recipe: Recipe, file_bytes: ReadFiles, tmp_path: Path) -> None:
    """The bundled pipeline at the default width, with two threads: one rank, against three that divide the shards."""
    data = recipe.model_dump(mode="json")
    data["dataset"] = {"prompts": 24, "samples_per_prompt": 2, "prompts_per_shard": 6}
    prompts = PromptSet(tuple(Prompt(f"p{n}", f"a large red circle {n}") for n in range(24)))
    shapes = resolve_base("shapes")
    source = load_float_pipeline(shapes, recipe.sampling.steps)
    torch.set_num_threads(2)
    alone = dataset_request(shapes, recipe_from_data(data, "test"), prompts, tmp_path / "alone")
    parts = dataset_request(shapes, recipe_from_data(data, "test"), prompts, tmp_path / "parts")
    generate_dataset(alone, source)
    for rank in (2, 1):
        write_shards(replace(parts, rank=rank, ranks=3), source)
    generate_dataset(replace(parts, rank=0, ranks=3), source)
    assert file_bytes(alone.out) == file_bytes(parts.out)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(
    *,
    base: BasePipeline,
    recipe: Recipe,
    prompts: PromptSet,
    dataset: LatentDataset,
    file_bytes: ReadFiles,
    kills: int,
    tmp_path: Path,
) -> None:
    texts = json.dumps([[prompt.id, prompt.text] for prompt in prompts.prompts])
    arguments = [str(base.folder), recipe.model_dump_json(), texts, str(tmp_path), str(kills)]
    run = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    codes = json.loads(run.stdout)
    assert codes.count(-signal.SIGKILL) == kills
    expected = file_bytes(dataset.folder)
    for out in (tmp_path / str(number) / "dataset" for number in range(1 + len(codes))):
        assert file_bytes(out) == expected
        assert not out.with_name("dataset.shards").exists()


def test_fewer_prompts_than_the_recipe_asks_for_are_named(
    base: BasePipeline,
    recipe: Recipe,
    prompts: PromptSet,
    source: FloatPipeline,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    generate_dataset(dataset_request(base, recipe, prompts, tmp_path / "all"), source)
    assert caplog.messages == []
    generate_dataset(dataset_request(base, recipe, prompts.first(2), tmp_path / "two"), source)
    assert caplog.messages == ["2 prompts are given, the recipe asks for 6 (dataset.prompts): the dataset is smaller"]


def test_a_whole_dataset_is_opened_and_checked(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, source: FloatPipeline, tmp_path: Path
) -> None:
    out = tmp_path / "dataset"

    def generate() -> LatentDataset:
        return generate_dataset(dataset_request(base, recipe, prompts.first(2), out), source)

    first = generate()
    stamp = (out / "manifest.json").stat().st_mtime_ns
    assert generate().manifest.digest == first.manifest.digest
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    shard = out / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    with pytest.raises(IntegrityError, match="shard-00000"):
        generate()


def test_a_second_process_is_refused_in_one_line(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, source: FloatPipeline, tmp_path: Path
) -> None:
    request = dataset_request(base, recipe, prompts, tmp_path / "dataset")
    with claimed(request.work / "rank-0-of-1"), pytest.raises(InputError, match=r"at work on .*rank-0-of-1") as caught:
        generate_dataset(request, source)
    assert "\n" not in str(caught.value)
    with claimed(request.work / "rank-1-of-2"), pytest.raises(InputError, match=r"at work in .* as rank-1-of-2"):
        generate_dataset(request, source)
    with claimed(request.work / "rank-1-of-2"):
        write_shards(replace(request, rank=0, ranks=2), source)  # its own sibling is welcome


def test_unfinished_work_of_another_request_is_refused_unless_replaced(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, source: FloatPipeline, tmp_path: Path
) -> None:
    request = dataset_request(base, recipe, prompts.first(4), tmp_path / "dataset")
    write_shards(replace(request, rank=1, ranks=2), source)
    other = dataset_request(base, recipe, prompts.first(2), request.out)
    with pytest.raises(InputError, match="holds an unfinished dataset with another prompts"):
        generate_dataset(other, source)
    torch.set_num_threads(2)
    with pytest.raises(InputError, match="with another threads"):
        generate_dataset(request, source)
    torch.set_num_threads(1)
    replaced = generate_dataset(DatasetRequest(other.base, other.prompts, recipe, other.out, replace=True), source)
    assert sorted(replaced.manifest.files) == ["shard-00000.safetensors", "texts.safetensors"]
    whole = generate_dataset(DatasetRequest(request.base, request.prompts, recipe, request.out, replace=True), source)
    assert whole.manifest.content["samples"] == 12


def test_what_there_is_to_do_is_told_first(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, source: FloatPipeline, tmp_path: Path
) -> None:
    estimates: list[Estimate] = []
    calls: list[int] = []
    hook = source.denoiser.register_forward_pre_hook(lambda _, args: calls.append(len(estimates)))
    request = dataset_request(base, recipe, prompts, tmp_path / "dataset")
    made = generate_dataset(request, source, on_estimate=estimates.append)
    hook.remove()
    (estimate,) = estimates
    assert estimate.samples == 18
    assert estimate.calls == calls.count(1)
    assert estimate.batch == 4
    arrays = (made.latents, made.cond, made.uncond, made.timestep_indices, made.prompt)
    texts = (made.texts, made.added_cond, made.cond_text, made.uncond_text)
    assert estimate.bytes == sum(array.nbytes for array in arrays + texts)
    assert 0 < estimate.seconds < 100


def test_no_room_on_the_disk(base: BasePipeline, recipe: Recipe, prompts: PromptSet, tmp_path: Path) -> None:
    shutil.copytree(base.folder, tmp_path / "large")
    config = tmp_path / "large" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 2**22}))
    request = dataset_request(base, recipe, prompts, tmp_path / "new" / "dataset")
    large = load_float_pipeline(BasePipeline(tmp_path / "large", base.base, 2.0), recipe.sampling.steps)
    with pytest.raises(
        InputError, match=r"dataset\.shards needs .* GB and its disk has .* GB left: .*dataset\.prompts"
    ):
        generate_dataset(request, large)
    assert not (tmp_path / "new").exists()


def test_an_open_guidance_scale_is_the_pipelines(base: BasePipeline, recipe: Recipe, prompts: PromptSet) -> None:
    data = recipe.model_dump(mode="json")
    data["sampling"]["guidance_scale"] = None
    request = dataset_request(base, recipe_from_data(data, "test"), prompts, Path("x"))
    assert request.recipe.sampling.guidance_scale == base.default_guidance
    data["dataset"]["prompts"] = 4
    assert dataset_request(base, recipe_from_data(data, "test"), prompts, Path("x")).prompts == prompts.first(4)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_other_families_store_what_their_time_features_depend_on(
    name: str, recipe: Recipe, prompts: PromptSet, tmp_path: Path
) -> None:
    data = recipe.model_dump(mode="json")
    data["sampling"]["max_sequence_length"] = 5
    base = sibling(name)
    request = dataset_request(base, recipe_from_data(data, "test"), prompts.first(2), tmp_path / "dataset")
    source = load_float_pipeline(base, 6)
    estimates: list[Estimate] = []
    made = generate_dataset(request, source, on_estimate=estimates.append)
    tokens = source.pipe.tokenizer.model_max_length + (5 if name == "sd3" else 0)
    assert made.texts.shape == (3, tokens, source.denoiser.family.text_width(source.denoiser.config))
    assert made.added_cond.shape == (3, source.denoiser.added_width)
    table = timestep_table_of(source.pipe.scheduler, 6, fractional=True)
    assert set(made.timestep_indices.tolist()) <= set(table.calibrated_indices)
    arrays = (made.latents, made.cond, made.uncond, made.timestep_indices, made.prompt)
    texts = (made.texts, made.added_cond, made.cond_text, made.uncond_text)
    assert estimates[0].bytes == sum(array.nbytes for array in arrays + texts)
    pairs = samples_at(made, np.arange(len(made.timestep_indices)))
    with torch.no_grad():
        predicted = source.denoiser(*pairs.inputs(torch.arange(len(pairs.sample))))
    assert float((predicted - pairs.output).norm() / pairs.output.norm()) < 4e-4  # float16's rounding
    again = dataset_request(base, recipe_from_data(data, "test"), prompts.first(2), tmp_path / "again")
    for rank in (1, 0):
        write_shards(replace(again, rank=rank, ranks=2), source)
    assert generate_dataset(again, source).manifest.digest == made.manifest.digest


@pytest.mark.gpu
def test_a_gpu_walks_nearly_the_same(
    base: BasePipeline,
    recipe: Recipe,
    prompts: PromptSet,
    dataset: LatentDataset,
    tmp_path: Path,
) -> None:
    request = dataset_request(base, recipe, prompts, tmp_path / "dataset")
    made = generate_dataset(request, context=Context(device="cuda"))
    assert made.manifest.content["device"].startswith("cuda (")
    assert made.timestep_indices.tolist() == dataset.timestep_indices.tolist()
    np.testing.assert_allclose(np.float32(made.cond), np.float32(dataset.cond), rtol=0.02, atol=0.02)
