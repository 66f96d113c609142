"""``s2p-deploy dataset``: alone, as ranks by hand, and as the processes of a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from s2p_deploy.records.files import claimed
from tests.cli.commands import Finished, Run
from tests.cli.test_bad_input import assert_refused
from tests.small_pipelines import tiny_base

Snapshot = Callable[[Path], dict[str, bytes]]
SETTINGS = (
    "dataset.prompts=6",
    "dataset.samples_per_prompt=2",
    "dataset.width=2",
    "dataset.prompts_per_shard=2",
    "sampling.steps=5",
)
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("tiny") / "pipeline").folder


def arguments(tiny: Path, out: Path, *more: object, recipe: str = "w8a8") -> list[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    options = ["--recipe", recipe, "--prompts", "shapes:train", "--out", out, "--device", "cpu", *settings, *more]
    return ["dataset", str(tiny), *map(str, options)]


def test_recipes_share_a_dataset(run: Run, tiny: Path, tmp_path: Path) -> None:
    made = run(*arguments(tiny, tmp_path / "d", "--json"))
    assert made.code == 0, made.err
    assert made.data["kind"] == "LatentDataset"
    lines = [line for line in made.err.splitlines() if line.startswith("dataset: ")]
    assert len(lines) == 1
    assert lines[0].startswith("dataset: 12 samples, 0.06")
    assert "denoiser calls at batch 4, about " in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    again = run(*arguments(tiny, tmp_path / "d", "--json", recipe="w4a8"))
    assert (again.data, again.err) == (made.data, "")
    assert run("inspect", tmp_path / "d", "--json").data["recipe"]["dataset"]["samples_per_prompt"] == 2


def test_ranks_by_hand(run: Run, tiny: Path, tmp_path: Path, snapshot: Snapshot) -> None:
    alone, parts = tmp_path / "alone", tmp_path / "parts"
    assert run(*arguments(tiny, alone)).code == 0
    first = run(*arguments(tiny, parts, "--ranks", 2, "--rank", 1, "--json"))
    assert first.data == {
        "kind": "shards",
        "path": str(tmp_path / "parts.shards"),
        "rank": 1,
        "ranks": 2,
        "missing": [0, 2],
    }
    assert_refused(run(*arguments(tiny, parts, "--merge")), 2, "lacks 2 of 3 shards (0, 2)")
    second = run(*arguments(tiny, parts, "--ranks", 2, "--rank", 0))
    assert "join them with --merge" in second.out
    assert run(*arguments(tiny, parts, "--merge")).code == 0
    assert snapshot(parts) == snapshot(alone)
    assert run(*arguments(tiny, parts, "--ranks", 2, "--rank", 0, "--json")).data["kind"] == "LatentDataset"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--rank", "1"], 2, ["--ranks and --rank go together"]),
        (["--ranks", "2", "--rank", "2"], 2, ["--rank 2 must be below --ranks 2"]),
        (["--ranks", "2", "--rank", "0", "--merge"], 2, ["--merge without"]),
        (["--merge"], 2, ["holds no shards"]),
        (["--device", "abacus"], 2, ["abacus", "cuda:N"]),
        (["--device", "meta"], 2, ["meta", "cuda:N"]),
        (["--device", "cuda:99"], 4, ["cuda:99", "--device cpu"]),
    ],
)
def test_what_is_refused(run: Run, tiny: Path, tmp_path: Path, options: list[str], code: int, words: list[str]) -> None:
    assert_refused(run(*arguments(tiny, tmp_path / "d", *options)), code, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused(run: Run, tiny: Path, tmp_path: Path) -> None:
    with claimed(tmp_path / "d.shards" / "rank-0-of-1"):
        assert_refused(run(*arguments(tiny, tmp_path / "d")), 2, "another process is at work")


def test_another_recipe_is_refused_unless_forced(run: Run, tiny: Path, tmp_path: Path) -> None:
    assert run(*arguments(tiny, tmp_path / "d")).code == 0
    changed = ("--set", "dataset.samples_per_prompt=1")
    assert_refused(run(*arguments(tiny, tmp_path / "d", *changed)), 2, "another recipe", "--force")
    assert run(*arguments(tiny, tmp_path / "d", *changed, "--force")).code == 0
    assert run("inspect", tmp_path / "d", "--json").data["recipe"]["dataset"]["samples_per_prompt"] == 1


def test_help(run: Run) -> None:
    shown = run("dataset", "--help")
    assert (shown.code, shown.err) == (0, "")
    assert all(option in shown.out for option in ("--json", "--merge", "--ranks", "--rank"))


@pytest.mark.slow
def test_two_launched_processes_make_the_bytes_of_one(tiny: Path, tmp_path: Path, snapshot: Snapshot) -> None:
    alone = process(["s2p_deploy.cli", *arguments(tiny, tmp_path / "alone")])
    assert alone.code == 0, alone.err
    both = process([*LAUNCH, "s2p_deploy.cli", *arguments(tiny, tmp_path / "both", "--json")])
    assert both.code == 0, both.err
    assert both.data["kind"] == "LatentDataset"  # one object: the other process prints nothing
    assert "dataset: 8 samples" in both.err  # the first process has two of three shards
    assert snapshot(tmp_path / "both") == snapshot(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "both"]


def process(command: list[str]) -> Finished:
    """One thread per process: the number is a part of the dataset."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)
