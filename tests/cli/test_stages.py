"""The stages through the command line, on the bundled pipeline at small sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.commands import Chain, Run, quick_settings


def test_a_finished_calibration_is_not_made_again(run: Run, chain: Chain) -> None:
    before = (chain.calib / "manifest.json").stat().st_mtime_ns
    again = run(
        "calibrate",
        "shapes",
        "--recipe",
        "w8a8",
        "--prompts",
        chain.prompts,
        "--out",
        chain.calib,
        *quick_settings(),
        "--json",
    )
    assert again.code == 0
    assert again.data["kind"] == "CalibratedModel"
    assert (chain.calib / "manifest.json").stat().st_mtime_ns == before


def test_force_replaces(run: Run, chain: Chain) -> None:
    before = (chain.engine / "manifest.json").stat().st_mtime_ns
    made = run("build", chain.graph, "--backend", "onnxruntime", "--out", chain.engine, "--force", "--json")
    assert made.code == 0, made.err
    assert (chain.engine / "manifest.json").stat().st_mtime_ns > before
    assert run("inspect", chain.engine, "--json").data["digest"] == made.data["digest"]


@pytest.mark.parametrize(
    ("kind", "record", "words"),
    [
        ("calib", "CalibratedModel", ["Plan: 77 layers", "conv_in", "training.iterations"]),
        ("dataset", "LatentDataset", ["shard-"]),
        ("graph", "ExportedGraph", ["timestep_index", "noise_pred", "Plan: 77 layers"]),
        ("engine", "Engine", ["onnxruntime", "Precision as the backend reports it", "mid_block.resnets.0.conv1"]),
    ],
)
def test_inspect(run: Run, made_chain: Chain, kind: str, record: str, words: list[str]) -> None:
    folder = made_chain.folder_of(kind)
    shown = run("inspect", folder)
    assert shown.code == 0
    assert shown.err == ""
    assert all(word in shown.out for word in [record, "every file matches", *words]), shown.out
    data = run("inspect", folder, "--json").data
    assert data["kind"] == record
    assert data["verified"] is True
    assert data["digest"] in shown.out
    assert all((folder / name).stat().st_size == size for name, size in data["files"].items())


def test_generate_depends_on_seed_and_prompt_alone(run: Run, made_chain: Chain, tmp_path: Path) -> None:
    def picture(name: str, prompt: str, seed: int) -> np.ndarray:
        made = run("generate", made_chain.engine, "--prompt", prompt, "--seed", seed, "--out", tmp_path / "new" / name)
        assert made.code == 0, made.err
        return np.asarray(Image.open(tmp_path / "new" / name))

    prompt = "a large red circle at the top left, white background"
    first = picture("a.png", prompt, 3)
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, picture("b.png", prompt, 3))
    assert not np.array_equal(first, picture("c.png", prompt, 4))


@pytest.mark.slow
def test_fractional_schedules_need_the_input_form(run: Run, made_chain: Chain, tmp_path: Path) -> None:
    graph, engine, picture = tmp_path / "graph", tmp_path / "engine", tmp_path / "karras.png"
    asked = ("--prompt", "a small red circle", "--scheduler", "euler-karras", "--steps", 4, "--out", picture, "--json")
    refused = run("generate", made_chain.engine, *asked)
    assert refused.code == 2
    assert "--time-table input" in refused.data["error"]["message"]
    assert run("export", made_chain.calib, "--out", graph, "--time-table", "input").code == 0
    assert run("build", graph, "--backend", "onnxruntime", "--out", engine).code == 0
    made = run("generate", engine, *asked)
    assert made.code == 0, made.err
    assert picture.is_file()
    assert made.data["scheduler"] == "euler-karras"
    assert sum(len(timesteps) for timesteps in made.data["timesteps"].values()) == 4


def test_validate_writes_a_report_and_says_what_failed(run: Run, made_chain: Chain, tmp_path: Path) -> None:
    report = tmp_path / "report"
    done = run("validate", made_chain.engine, "--prompts", made_chain.prompts, "--out", report, "--json")
    assert done.code in {0, 3}, done.err
    assert done.data["verdict"] in {"passed", "failed", "not verified"}
    assert (report / "report.html").is_file()
    assert "pictures" in done.err, "progress goes to stderr"
    assert "\x1b" not in done.err
    assert ("error" in done.data) == (done.code == 3)
    shown = run("inspect", report)
    assert shown.code == 0
    assert "Gates" in shown.out


def test_moved_parents_can_be_pointed_at(run: Run, chain: Chain, tmp_path: Path) -> None:
    moved = chain.graph.rename(tmp_path / "moved-graph")
    options = ("--prompts", chain.prompts, "--out", tmp_path / "report")
    lost = run("validate", chain.engine, *options)
    assert lost.code == 2
    assert "--graph" in lost.err
    wrong = run("validate", chain.engine, *options, "--graph", moved, "--calib", chain.calib / "dataset")
    assert wrong.code == 5, "the graph is found, what is given as its calibrated model is another artifact"
    assert "dataset" in wrong.err


@pytest.mark.parametrize(
    "command", ["calibrate", "export", "build", "validate", "generate", "inspect", "doctor", "demo"]
)
def test_help(run: Run, command: str) -> None:
    shown = run(command, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert "--json" in shown.out


def test_doctor(run: Run) -> None:
    shown = run("doctor")
    assert shown.code == 0
    assert shown.err == ""
    backends = {item["backend"]: item for item in run("doctor", "--json").data["backends"]}
    assert set(backends) == {"onnxruntime", "openvino", "tensorrt_rtx", "tensorrt"}
    assert backends["onnxruntime"]["missing"] is None
    assert all(name in shown.out for name in backends)
