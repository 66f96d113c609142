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
from diffusers import StableDiffusionPipeline
from sibling_pipelines import sibling

from s2p_deploy.calib import generate_dataset
from s2p_deploy.calib.dataset.estimate import Estimate
from s2p_deploy.calib.dataset.generate import Walker, load_walker, make_dataset, write_shards
from s2p_deploy.calib.dataset.shards import DatasetRequest, dataset_request
from s2p_deploy.calib.dataset.stored_points import points_at
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families import BasePipeline, HotDenoiser, resolve_base
from s2p_deploy.recipe import Recipe, recipe_from_data
from s2p_deploy.records import LatentDataset, Prompt, PromptSet
from s2p_deploy.records.lock import claimed
from s2p_deploy.timesteps import timestep_table_of
from tests.kill_loop import kill_script

ReadFiles = Callable[[Path], dict[str, bytes]]

KILLED = kill_script(
    imports="from s2p_deploy.calib.dataset.generate import load_walker, make_dataset\n"
    "from s2p_deploy.calib.dataset.shards import dataset_request, open_finished",
    setup="walker = load_walker(base, recipe.sampling.steps)",
    work="request = dataset_request(base, recipe, prompts, out / 'dataset')\n"
    "open_finished(request) or make_dataset(request, walker)",
)


@pytest.fixture
def walker(base: BasePipeline, recipe: Recipe) -> Walker:
    return load_walker(base, recipe.sampling.steps)


def test_what_a_dataset_holds(dataset: LatentDataset, recipe: Recipe, prompts: PromptSet) -> None:
    assert dataset.latents.shape == dataset.cond.shape == dataset.uncond.shape == (18, 4, 8, 8)
    assert dataset.latents.dtype == np.float16
    assert dataset.prompt.tolist() == [index for index in range(6) for _ in range(3)]
    assert set(dataset.rows.tolist()) <= set(range(1000))
    assert dataset.texts.shape == (7, 24, 128)  # six prompts and the empty one
    assert dataset.added_cond.shape == (7, 0)
    assert sorted(dataset.manifest.files) == [*(f"shard-{n:05d}.safetensors" for n in range(3)), "texts.safetensors"]
    content = dataset.manifest.content
    assert (content["points"], content["width"], content["prompts"]) == (18, 2, prompts.digest)
    assert (content["threads"], content["device"]) == (1, "cpu")
    assert content["sampling"] == {"scheduler": "PNDMScheduler", "steps": 6, "guidance_scale": 2.5}
    assert set(dataset.manifest.recipe) == {"sampling", "dataset"}
    assert dataset.manifest.recipe["dataset"] == recipe.dataset.model_dump(mode="json")
    assert [path.name for path in dataset.folder.parent.iterdir()] == ["dataset"]


def test_recipes_that_agree_in_sampling_and_dataset_share_one(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, walker: Walker, tmp_path: Path
) -> None:
    shared = tmp_path / "dataset"
    first = make_dataset(dataset_request(base, recipe, prompts.first(2), shared), walker)
    other = recipe.model_copy(update={"name": "other", "weights": "int8", "rules": ()})
    again = generate_dataset(walker.pipe, walker.teacher, base.base, prompts.first(2), other, out=shared)
    assert again.manifest.digest == first.manifest.digest
    longer = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"steps": 7})})
    with pytest.raises(InputError, match=r"dataset was made from another recipe: choose another --out"):
        generate_dataset(walker.pipe, walker.teacher, base.base, prompts.first(2), longer, out=shared)
    with pytest.raises(InputError, match="another prompts"):
        generate_dataset(walker.pipe, walker.teacher, base.base, prompts.first(3), recipe, out=shared)


def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(
    *,
    base: BasePipeline,
    pipe: StableDiffusionPipeline,
    hot: HotDenoiser,
    prompts: PromptSet,
    recipe: Recipe,
    dataset: LatentDataset,
    file_bytes: ReadFiles,
    tmp_path: Path,
) -> None:
    out = tmp_path / "dataset"
    shards = tmp_path / "dataset.shards"
    stamps: dict[str, int] = {}

    def interrupt(stage: str, done: int, total: int) -> None:
        stamps.update({path.name: path.stat().st_mtime_ns for path in shards.glob("shard-*")})
        if stamps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_dataset(pipe, hot, base.base, prompts, recipe, out=out, progress=interrupt)
    assert len(stamps) == 1
    (name, written) = stamps.popitem()
    seen: list[tuple[int, int]] = []
    kept: set[int] = set()

    def watch(stage: str, done: int, total: int) -> None:
        seen.append((done, total))
        kept.add((shards / name).stat().st_mtime_ns)

    generate_dataset(pipe, hot, base.base, prompts, recipe, out=out, progress=watch)
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
    walker: Walker,
    dataset: LatentDataset,
    file_bytes: ReadFiles,
    ranks: int,
    tmp_path: Path,
) -> None:
    """Of four ranks the last has nothing to do: there are three shards. The first one comes last, and merges."""
    request = dataset_request(base, recipe, prompts, tmp_path / "dataset")
    for rank in reversed(range(1, ranks)):
        write_shards(request, Walker(walker.pipe, walker.teacher, rank=rank, ranks=ranks))
    generate_dataset(walker.pipe, walker.teacher, base.base, prompts, recipe, out=request.out, rank=0, ranks=ranks)
    assert file_bytes(request.out) == file_bytes(dataset.folder)


def test_another_number_of_ranks_can_go_on(
    *,
    base: BasePipeline,
    recipe: Recipe,
    prompts: PromptSet,
    walker: Walker,
    dataset: LatentDataset,
    file_bytes: ReadFiles,
    tmp_path: Path,
) -> None:
    request = dataset_request(base, recipe, prompts, tmp_path / "dataset")
    write_shards(request, Walker(walker.pipe, walker.teacher, rank=1, ranks=2))
    make_dataset(request, walker)
    assert file_bytes(request.out) == file_bytes(dataset.folder)


@pytest.mark.slow
def test_kernels_of_full_size_know_no_neighbors_either(recipe: Recipe, file_bytes: ReadFiles, tmp_path: Path) -> None:
    """The bundled pipeline at the default width, with two threads: one rank, against three that divide the shards."""
    data = recipe.model_dump(mode="json")
    data["dataset"] = {"prompts": 24, "points_per_prompt": 2, "prompts_per_shard": 6}
    prompts = PromptSet(tuple(Prompt(f"p{n}", f"a large red circle {n}") for n in range(24)))
    shapes = resolve_base("shapes")
    walker = load_walker(shapes, recipe.sampling.steps)
    torch.set_num_threads(2)
    alone = dataset_request(shapes, recipe_from_data(data, "test"), prompts, tmp_path / "alone")
    parts = dataset_request(shapes, recipe_from_data(data, "test"), prompts, tmp_path / "parts")
    make_dataset(alone, walker)
    for rank in (2, 1):
        write_shards(parts, Walker(walker.pipe, walker.teacher, rank=rank, ranks=3))
    make_dataset(parts, Walker(walker.pipe, walker.teacher, rank=0, ranks=3))
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


def test_a_whole_dataset_is_opened_and_checked(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, walker: Walker, tmp_path: Path
) -> None:
    out = tmp_path / "dataset"

    def generate() -> LatentDataset:
        return generate_dataset(walker.pipe, walker.teacher, base.base, prompts.first(2), recipe, out=out)

    first = generate()
    stamp = (out / "manifest.json").stat().st_mtime_ns
    assert generate().manifest.digest == first.manifest.digest
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    shard = out / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    with pytest.raises(IntegrityError, match="shard-00000"):
        generate()


def test_a_second_process_is_refused_in_one_line(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, walker: Walker, tmp_path: Path
) -> None:
    request = dataset_request(base, recipe, prompts, tmp_path / "dataset")
    with claimed(request.work / "rank-0-of-1"), pytest.raises(InputError, match=r"at work on .*rank-0-of-1") as caught:
        make_dataset(request, walker)
    assert "\n" not in str(caught.value)
    with claimed(request.work / "rank-1-of-2"), pytest.raises(InputError, match=r"at work in .* as rank-1-of-2"):
        make_dataset(request, walker)
    with claimed(request.work / "rank-1-of-2"):
        write_shards(request, Walker(walker.pipe, walker.teacher, rank=0, ranks=2))  # its own sibling is welcome


def test_unfinished_work_of_another_request_is_refused_unless_replaced(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, walker: Walker, tmp_path: Path
) -> None:
    request = dataset_request(base, recipe, prompts.first(4), tmp_path / "dataset")
    write_shards(request, Walker(walker.pipe, walker.teacher, rank=1, ranks=2))
    other = dataset_request(base, recipe, prompts.first(2), request.out)
    with pytest.raises(InputError, match="holds an unfinished dataset with another prompts"):
        make_dataset(other, walker)
    torch.set_num_threads(2)
    with pytest.raises(InputError, match="with another threads"):
        make_dataset(request, walker)
    torch.set_num_threads(1)
    replaced = make_dataset(DatasetRequest(other.base, other.prompts, recipe, other.out, replace=True), walker)
    assert sorted(replaced.manifest.files) == ["shard-00000.safetensors", "texts.safetensors"]
    whole = make_dataset(DatasetRequest(request.base, request.prompts, recipe, request.out, replace=True), walker)
    assert whole.manifest.content["points"] == 12


def test_what_there_is_to_do_is_told_first(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, walker: Walker, tmp_path: Path
) -> None:
    told: list[Estimate] = []
    calls: list[int] = []
    walker.teacher.register_forward_pre_hook(lambda _, args: calls.append(len(told)))
    request = dataset_request(base, recipe, prompts, tmp_path / "dataset")
    made = make_dataset(request, Walker(walker.pipe, walker.teacher, tell=told.append))
    (estimate,) = told
    assert estimate.points == 18
    assert estimate.calls == calls.count(1)
    assert estimate.samples == 4
    arrays = (made.latents, made.cond, made.uncond, made.rows, made.prompt)
    texts = (made.texts, made.added_cond, made.cond_text, made.uncond_text)
    assert estimate.bytes == sum(array.nbytes for array in arrays + texts)
    assert 0 < estimate.seconds < 100


def test_no_room_on_the_disk(base: BasePipeline, recipe: Recipe, prompts: PromptSet, tmp_path: Path) -> None:
    shutil.copytree(base.folder, tmp_path / "large")
    config = tmp_path / "large" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 2**22}))
    request = dataset_request(base, recipe, prompts, tmp_path / "new" / "dataset")
    large = load_walker(BasePipeline(tmp_path / "large", base.base, 2.0), recipe.sampling.steps)
    with pytest.raises(
        InputError, match=r"dataset\.shards needs .* GB and its disk has .* GB left: .*dataset\.prompts"
    ):
        make_dataset(request, large)
    assert not (tmp_path / "new").exists()


def test_an_open_guidance_scale_is_the_pipelines(base: BasePipeline, recipe: Recipe, prompts: PromptSet) -> None:
    data = recipe.model_dump(mode="json")
    data["sampling"]["guidance_scale"] = None
    request = dataset_request(base, recipe_from_data(data, "test"), prompts, Path("x"))
    assert request.recipe.sampling.guidance_scale == base.default_guidance
    data["dataset"]["prompts"] = 4
    assert dataset_request(base, recipe_from_data(data, "test"), prompts, Path("x")).prompts == prompts.first(4)


def test_normal_timesteps_are_another_dataset(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, walker: Walker, dataset: LatentDataset, tmp_path: Path
) -> None:
    data = recipe.model_dump(mode="json")
    data["dataset"]["timesteps"] = "normal"
    made = make_dataset(dataset_request(base, recipe_from_data(data, "test"), prompts, tmp_path / "d"), walker)
    assert made.manifest.recipe["dataset"]["timesteps"] == "normal"
    assert made.rows.shape == dataset.rows.shape
    assert made.rows.tolist() != dataset.rows.tolist()


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_other_families_store_what_their_time_features_depend_on(
    name: str, recipe: Recipe, prompts: PromptSet, tmp_path: Path
) -> None:
    data = recipe.model_dump(mode="json")
    data["sampling"]["max_sequence_length"] = 5
    base = sibling(name)
    request = dataset_request(base, recipe_from_data(data, "test"), prompts.first(2), tmp_path / "dataset")
    walker = load_walker(base, 6)
    told: list[Estimate] = []
    made = make_dataset(request, replace(walker, tell=told.append))
    tokens = walker.pipe.tokenizer.model_max_length + (5 if name == "sd3" else 0)
    assert made.texts.shape == (3, tokens, walker.teacher.kind.text_width(walker.teacher.config))
    assert made.added_cond.shape == (3, walker.teacher.added_width)
    table = timestep_table_of(walker.pipe.scheduler, 6, fractional=True)
    assert set(made.rows.tolist()) <= set(table.calibrated_rows)
    arrays = (made.latents, made.cond, made.uncond, made.rows, made.prompt)
    texts = (made.texts, made.added_cond, made.cond_text, made.uncond_text)
    assert told[0].bytes == sum(array.nbytes for array in arrays + texts)
    points = points_at(made, np.arange(len(made.rows)))
    with torch.no_grad():
        answers = walker.teacher(*points.inputs(torch.arange(len(points.row))))
    assert float((answers - points.output).norm() / points.output.norm()) < 4e-4  # float16's rounding
    again = dataset_request(base, recipe_from_data(data, "test"), prompts.first(2), tmp_path / "again")
    for rank in (1, 0):
        write_shards(again, Walker(walker.pipe, walker.teacher, rank=rank, ranks=2))
    assert make_dataset(again, walker).manifest.digest == made.manifest.digest


@pytest.mark.gpu
def test_a_gpu_walks_nearly_the_same(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, walker: Walker, dataset: LatentDataset, tmp_path: Path
) -> None:
    request = dataset_request(base, recipe, prompts, tmp_path / "dataset")
    made = make_dataset(request, Walker(walker.pipe, walker.teacher, torch.device("cuda")))
    assert made.manifest.content["device"].startswith("cuda (")
    assert walker.teacher.network.device.type == "cpu"
    assert made.rows.tolist() == dataset.rows.tolist()
    np.testing.assert_allclose(made.cond.astype(np.float32), dataset.cond.astype(np.float32), rtol=0.02, atol=0.02)
