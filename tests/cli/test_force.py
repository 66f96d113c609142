"""``--force`` replaces an artifact of the kind that a command writes, and nothing else: least of all what it reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from s2p_deploy.families import resolve_base
from tests.cli.commands import Chain, Run, quick_settings
from tests.cli.test_bad_input import assert_refused

Snapshot = Callable[[Path], dict[str, bytes]]


def writers(chain: Chain, out: Path) -> dict[str, list[object]]:
    """Commands that write ``out``."""
    w8a8 = ["shapes", "--recipe", "w8a8", "--prompts", chain.prompts, *quick_settings()]
    return {
        "dataset": ["dataset", *w8a8, "--out", out],
        "calibrate": ["calibrate", *w8a8, "--out", out],
        "streamed": ["calibrate", "shapes", "--recipe", "ptq-stream", "--out", out],
        "adapt": ["adapt", chain.calib, "--lora", "none.safetensors", "--out", out],
        "export": ["export", chain.calib, "--out", out],
        "build": ["build", chain.graph, "--backend", "onnxruntime", "--out", out],
        "components": ["components", "shapes", "--backend", "onnxruntime", "--out", out],
        "export-triton": ["export-triton", chain.engine, "--out", out],
        "validate": ["validate", chain.engine, "--prompts", chain.prompts, "--out", out],
    }


COMMANDS = [
    "dataset",
    "calibrate",
    "streamed",
    "adapt",
    "export",
    "build",
    "components",
    "export-triton",
    "validate",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_artifact_stays(
    run: Run, made_chain: Chain, tmp_path: Path, snapshot: Snapshot, command: str
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("notes")
    before = snapshot(tmp_path)
    for name, words in (("notes", "no artifact of kind"), ("file", "no artifact of kind"), ("link", "is a link")):
        asked = writers(made_chain, tmp_path / name)[command]
        assert_refused(run(*asked, "--force"), 2, name, words, "choose another --out")
        unforced = run(*asked)
        assert_refused(unforced, 2, name, words, "choose another --out")
        assert "--force" not in unforced.err
    assert snapshot(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "notes"]


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("dataset", "calib"),
        ("calibrate", "engine"),
        ("streamed", "graph"),
        ("adapt", "engine"),
        ("adapt", "calib"),
        ("adapt", "calib/new"),
        ("export", "engine"),
        ("export", "calib"),
        ("export", "calib/new"),
        ("build", "calib"),
        ("build", "graph"),
        ("build", "graph/new"),
        ("components", "engine"),
        ("export-triton", "engine"),
        ("export-triton", "engine/new"),
        ("validate", "engine"),
        ("validate", "graph"),
        ("validate", "calib/dataset"),
    ],
)
def test_an_input_or_an_artifact_of_another_kind_stays(
    run: Run, chain: Chain, snapshot: Snapshot, command: str, place: str
) -> None:
    folder = chain.calib.parent
    before = snapshot(folder)
    asked = writers(chain, folder / place)[command]
    assert_refused(run(*asked, "--force"), 2, place, "choose another --out")
    assert_refused(run(*asked), 2, place)
    assert snapshot(folder) == before


def test_what_holds_an_input_stays(run: Run, chain: Chain, snapshot: Snapshot) -> None:
    outer = chain.calib.parent / "outer"
    shutil.copytree(chain.engine, outer)
    shutil.copytree(chain.graph, outer / "graph")
    before = snapshot(outer)
    finished = run("build", outer / "graph", "--backend", "onnxruntime", "--out", outer, "--force")
    assert_refused(finished, 2, "holds the graph", "choose another --out")
    assert snapshot(outer) == before


def test_a_model_a_dataset_or_a_model_to_go_on_from_stays(run: Run, chain: Chain, snapshot: Snapshot) -> None:
    folder = chain.calib.parent
    shutil.copytree(resolve_base("shapes").folder, folder / "model")
    before = snapshot(folder)
    quick = ["--recipe", "w8a8", "--prompts", chain.prompts, "--force", *quick_settings()]
    for arguments, words in (
        (["calibrate", folder / "model", "--out", folder / "model"], "is the pipeline"),
        (["calibrate", folder / "model", "--out", folder / "model" / "calib"], "lies in the pipeline"),
        (["dataset", folder / "model", "--out", folder / "model" / "dataset"], "lies in the pipeline"),
        (["calibrate", "shapes", "--from", chain.calib, "--out", chain.calib], "is the initial model"),
        (["calibrate", "shapes", "--dataset", chain.calib / "dataset", "--out", chain.calib], "holds the dataset"),
    ):
        assert_refused(run(*arguments, *quick), 2, words, "choose another --out")
    assert snapshot(folder) == before


def test_the_engine_that_adapt_builds_replaces_no_input(run: Run, chain: Chain, snapshot: Snapshot) -> None:
    folder = chain.calib.parent
    before = snapshot(folder)
    asked = ["adapt", chain.calib, "--lora", "none.safetensors", "--out", folder / "new", "--force"]
    for more, words in (
        (["--engine", chain.graph, "--backend", "onnxruntime"], "no artifact of kind Engine"),
        (["--engine", chain.engine, "--like", chain.engine], "is the engine"),
        (["--engine", folder / "new", "--backend", "onnxruntime"], "is the adapted model"),
    ):
        assert_refused(run(*asked, *more), 2, words)
    assert snapshot(folder) == before


def test_work_is_done_in_no_folder_of_other_files(run: Run, made_chain: Chain, tmp_path: Path) -> None:
    for name, command in (("x.partial", "calibrate"), ("x.shards", "dataset"), ("x.partial", "validate")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "notes.txt").write_text("precious")
        refused = run(*writers(made_chain, tmp_path / "x")[command], "--force")
        assert refused.code == 2
        assert f"{name} is needed for unfinished work and is none: move it away" in refused.err
        assert (tmp_path / name / "notes.txt").read_text() == "precious"


def test_a_damaged_artifact_of_the_kind_is_made_again(run: Run, chain: Chain) -> None:
    manifest = chain.graph / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": 2', '"schema": 1'))
    assert run("inspect", chain.graph).code == 5
    assert run(*writers(chain, chain.graph)["export"], "--force").code == 0
    assert run("inspect", chain.graph).code == 0


def test_compare_refuses_before_it_draws(run: Run, made_chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "out" / "w8a8" / "calib").mkdir(parents=True)
    (tmp_path / "out" / "w8a8" / "calib" / "notes.txt").write_text("precious")
    arguments = ["--model", "shapes", "--prompts", made_chain.prompts, "--held-out", "shapes:held_out", "--force"]
    finished = run("compare", "w8a8", *arguments, "--out", tmp_path / "out", *quick_settings())
    assert_refused(finished, 2, "no artifact of kind CalibratedModel")
    assert (tmp_path / "out" / "w8a8" / "calib" / "notes.txt").exists()
