"""Whatever is wrong: the right exit code, one line on stderr, no traceback, and earlier artifacts as they were."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from s2p_deploy.records import read_manifest, write_artifact
from tests.cli.commands import Chain, Finished, Run, quick_settings
from tests.small_pipelines import PIPELINES, sibling

REFINER = str(PIPELINES / "shapes-refiner")
Snapshot = Callable[[Path], dict[str, bytes]]


def assert_refused(finished: Finished, code: int, *words: str) -> None:
    assert finished.code == code, finished.err
    assert finished.out == ""
    lines = finished.err.splitlines()
    assert len(lines) == 1, finished.err
    assert lines[0].startswith("s2p-deploy: ")
    assert all(word in lines[0] for word in words), lines[0]


def calibrate(
    run: Run, out: Path, prompts: Path, *, model: object = "shapes", recipe: str = "w8a8", more: tuple[str, ...] = ()
) -> Finished:
    return run("calibrate", model, "--recipe", recipe, "--prompts", prompts, "--out", out, *quick_settings(*more))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Missing command"]),
        (["paint"], ["No such command"]),
        (["calibrate"], ["MODEL"]),
        (["calibrate", "shapes", "--out", "x", "--prompts", "y"], ["--recipe"]),
        (["export", "x", "--out", "y", "--dtype", "fp8"], ["fp8", "fp32", "fp16"]),
        (["generate", "x", "--prompt", "p", "--out", "y.png", "--steps", "0"], ["--steps"]),
        (["generate", "x", "--prompt", "p", "--out", "y.gif"], ["y.gif", ".png"]),
        (["inspect", "no-such-folder"], ["no-such-folder", "manifest.json"]),
        (["export", "no-such-folder", "--out", "y"], ["no-such-folder"]),
        (
            ["calibrate", "shapes", "--recipe", "fp", "--prompts", "shapes:nowhere", "--out", "x"],
            ["shapes:nowhere", "shapes:train"],
        ),
        (["calibrate", "shapes", "--recipe", "fp", "--prompts", "no.txt", "--out", "x"], ["no.txt", "does not exist"]),
        (["calibrate", "shapes", "--recipe", "w2a2", "--prompts", "no.txt", "--out", "x"], ["w2a2", "w4a8"]),
        (
            ["calibrate", REFINER, "--recipe", "w8a8", "--prompts", "shapes:train", "--out", "x"],
            ["a refiner changes another pipeline's pictures", "--set sampling.pictures=MODEL"],
        ),
    ],
)
def test_usage(run: Run, arguments: list[str], words: list[str]) -> None:
    assert_refused(run(*arguments), 2, *words)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("training", ["KEY=VALUE"]),
        ("=3", ["KEY=VALUE"]),
        ("training.iterations=[", ["not valid YAML"]),
        ("training.iteration=3", ["training.iteration", "no such key"]),
        ("training.iterations=many", ["training.iterations", "integer"]),
        ("training=3", ["contradicts"]),
    ],
)
def test_settings(run: Run, tmp_path: Path, prompts_file: Path, setting: str, words: list[str]) -> None:
    arguments = ("--set", "training.iterations=3", "--set", setting) if setting == "training=3" else ("--set", setting)
    if setting == "training=3":
        words = ["training", "input should be"]
    finished = run(
        "calibrate", "shapes", "--recipe", "w8a8", "--prompts", prompts_file, "--out", tmp_path / "x", *arguments
    )
    assert_refused(finished, 2, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("", ["--out '.'", "new folder"]),
        (".", ["--out '.'", "new folder"]),
        ("..", ["--out '..'", "new folder"]),
        ("/", ["--out '/'", "new folder"]),
        ("file/x", ["file", "cannot be used"]),
        ("x" * 300, ["cannot be used"]),
    ],
)
def test_an_out_that_cannot_be_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert_refused(run("calibrate", "shapes", "--recipe", "fp", "--out", out), 2, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_that_is_not_there(run: Run, tmp_path: Path, prompts_file: Path) -> None:
    assert_refused(
        calibrate(run, tmp_path / "x", prompts_file, model=tmp_path / "none"), 2, "does not exist", "diffusers"
    )


def test_a_folder_that_is_no_pipeline(run: Run, tmp_path: Path, prompts_file: Path) -> None:
    assert_refused(calibrate(run, tmp_path / "x", prompts_file, model=tmp_path), 2, "model_index.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["calibrate", "", "--recipe", "fp", "--out", "x"], ["the model is empty", "hub id"]),
        (["inspect", ""], [". is no artifact", "manifest.json"]),
        (["inspect", "/"], ["/ is no artifact", "manifest.json"]),
        (["calibrate", "text.txt", "--recipe", "fp", "--out", "x"], ["text.txt", "no diffusers pipeline"]),
        (["calibrate", "shapes", "--recipe", "text.txt", "--out", "x"], ["text.txt", "mapping"]),
        (["calibrate", "shapes", "--recipe", "w8a8", "--prompts", "folder", "--out", "x"], ["folder", "is a folder"]),
        (["calibrate", "shapes", "--recipe", "fp", "--out", "folder"], ["folder", "choose another --out"]),
        (["calibrate", "shapes", "--recipe", "fp", "--plan", "none", "--out", "x"], ["none", "No such file"]),
        (["export", "text.txt", "--out", "x"], ["text.txt", "no artifact"]),
        (["generate", "none", "--prompt", "x", "--out", "x.png"], ["none", "does not exist"]),
        (["validate", "--recheck", "folder"], ["folder", "no artifact"]),
        (["demo", "--out", "text.txt"], ["text.txt", "cannot be used"]),
    ],
)
def test_a_file_for_a_folder_and_the_like(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a red circle\n", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    assert_refused(run(*arguments), 2, *words)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "text.txt"]


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "none", "--prompt", "x", "--out"],
        ["validate", "none", "--bisect", "--plan-out"],
        ["validate", "none", "--prompts", "none", "--out", "report", "--junit"],
        ["validate", "--recheck", "none", "--junit"],
    ],
)
def test_a_file_to_write_is_looked_at_before_all_else(run: Run, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    assert_refused(run(*command, tmp_path / "file" / "x.png"), 2, "x.png cannot be used", "file is no folder")
    assert_refused(run(*command, tmp_path / "folder.png"), 2, "folder.png is a folder", "name of a file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_place_where_no_folder_can_be_made(run: Run) -> None:
    assert_refused(run("demo", "--out", "/proc/nothing/demo"), 2, "/proc/nothing", "cannot be used")


def test_an_artifact_of_another_kind(run: Run, chain: Chain, tmp_path: Path) -> None:
    expected = {"export": "CalibratedModel", "build": "ExportedGraph", "generate": "Engine", "validate": "Engine"}
    more: dict[str, tuple[object, ...]] = {
        "build": ("--backend", "onnxruntime"),
        "generate": ("--prompt", "x"),
        "validate": ("--prompts", chain.prompts),
    }
    for command, kind in expected.items():
        given = chain.engine if kind != "Engine" else chain.calib
        refused = run(command, given, "--out", tmp_path / "x.png", *more.get(command, ()))
        assert_refused(refused, 2, given.name, f"expected {kind}")
    assert not (tmp_path / "x.png").exists()


def test_a_hub_id_without_network(run: Run, tmp_path: Path, prompts_file: Path) -> None:
    assert_refused(calibrate(run, tmp_path / "x", prompts_file, model="nobody/nothing"), 2, "nobody/nothing", "hub")


def test_a_rule_that_matches_no_layer_blocks_no_later_start(run: Run, tmp_path: Path, prompts_file: Path) -> None:
    rule = "rules=[{match: 'conv_inn', weights: none}]"
    assert_refused(calibrate(run, tmp_path / "x", prompts_file, more=(rule,)), 2, "conv_inn")
    assert calibrate(run, tmp_path / "x", prompts_file, recipe="fp").code == 0


def test_an_empty_prompt_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    assert_refused(calibrate(run, tmp_path / "x", tmp_path / "empty.txt"), 2, "empty.txt", "at least one")


def test_an_out_of_another_request(run: Run, chain: Chain, snapshot: Snapshot) -> None:
    before = snapshot(chain.calib.parent)
    assert_refused(calibrate(run, chain.calib, chain.prompts, more=("training.seed=7",)), 2, "--force")
    assert_refused(run("export", chain.calib, "--out", chain.graph), 2, "--force")
    assert_refused(run("build", chain.graph, "--backend", "onnxruntime", "--out", chain.engine), 2, "--force")
    assert snapshot(chain.calib.parent) == before


def test_a_timestep_outside_the_table(run: Run, chain: Chain, tmp_path: Path) -> None:
    options = ("--prompt", "x", "--scheduler", "ddim", "--steps", "50", "--out", tmp_path / "p.png")
    assert_refused(run("generate", chain.engine, *options), 2, "timestep", "outside the calibrated table")
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_scale_that_is_no_scale(run: Run, chain: Chain, tmp_path: Path, value: float) -> None:
    manifest = read_manifest(chain.calib)
    spoiled = tmp_path / "spoiled"

    def fill(folder: Path) -> dict[str, object]:
        for name in manifest.files:
            shutil.copyfile(chain.calib / name, folder / name)
        table = load_file(folder / "act_scales.safetensors")
        table["act_scales"][1, 0] = value
        points = (chain.calib / "act_scales.safetensors").read_bytes()
        header = json.loads(points[8 : 8 + int.from_bytes(points[:8], "little")])
        save_file(table, folder / "act_scales.safetensors", metadata=header["__metadata__"])
        return manifest.content

    write_artifact(spoiled, kind=manifest.kind, base=manifest.base, recipe=manifest.recipe, fill=fill)
    assert_refused(run("export", spoiled, "--out", tmp_path / "graph"), 2, "timestep index 1", "above zero")
    assert not (tmp_path / "graph").exists()


@pytest.mark.parametrize("kind", ["calib", "dataset", "graph", "engine"])
@pytest.mark.parametrize("largest", [True, False])
def test_a_changed_byte(run: Run, chain: Chain, kind: str, largest: bool) -> None:
    folder = chain.folder_of(kind)
    name = (
        max(read_manifest(folder).files, key=lambda name: (folder / name).stat().st_size)
        if largest
        else "manifest.json"
    )
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    assert_refused(run("inspect", folder), 5, folder.name)
    next_stage: dict[str, list[object]] = {
        "calib": ["export", folder, "--out", folder.parent / "new"],
        "graph": ["build", folder, "--backend", "onnxruntime", "--out", folder.parent / "new"],
        "engine": ["generate", folder, "--prompt", "x", "--out", folder.parent / "p.png"],
    }
    if kind in next_stage:
        assert_refused(run(*next_stage[kind]), 5, folder.name)
    assert not (folder.parent / "new").exists()


def test_an_engine_of_another_graph(run: Run, chain: Chain, tmp_path: Path) -> None:
    manifest = read_manifest(chain.graph)

    def fill(folder: Path) -> dict[str, object]:
        for name in manifest.files:
            shutil.copyfile(chain.graph / name, folder / name)
        return manifest.content

    write_artifact(tmp_path / "other", kind=manifest.kind, base=manifest.base, recipe={"name": "other"}, fill=fill)
    options = ("--prompts", chain.prompts, "--out", tmp_path / "report", "--graph", tmp_path / "other")
    assert_refused(run("validate", chain.engine, *options), 5, "other", "digest differs")


def test_another_pipeline_than_the_engines(run: Run, chain: Chain, tmp_path: Path) -> None:
    from s2p_deploy.families import resolve_base

    shutil.copytree(resolve_base("shapes").folder, tmp_path / "fine-tuned")
    config = tmp_path / "fine-tuned" / "unet" / "config.json"
    config.write_text(config.read_text() + "\n")
    options = ("--prompt", "x", "--out", tmp_path / "p.png", "--model", tmp_path / "fine-tuned")
    assert_refused(run("generate", chain.engine, *options), 5, "fine-tuned", "--model")


def test_an_unknown_backend(run: Run, chain: Chain, tmp_path: Path) -> None:
    finished = run("build", chain.graph, "--backend", "abacus", "--out", tmp_path / "x")
    assert_refused(finished, 2, "abacus", "onnxruntime")


def test_an_unknown_precision(run: Run, chain: Chain, tmp_path: Path) -> None:
    finished = run("build", chain.graph, "--backend", "openvino", "--precision", "int1", "--out", tmp_path / "x")
    assert_refused(finished, 2, "int1")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_a_backend_whose_library_is_missing(run: Run, chain: Chain, tmp_path: Path) -> None:
    finished = run("build", chain.graph, "--backend", "tensorrt", "--out", tmp_path / "x")
    assert_refused(finished, 4, "tensorrt", "install")
    assert list(tmp_path.glob("*x*")) == []


def test_failures_are_json_too(run: Run, tmp_path: Path) -> None:
    for arguments, code in ((["inspect", tmp_path, "--json"], 2), (["calibrate", "--json"], 2)):
        finished = run(*arguments)
        assert finished.code == code
        assert set(finished.data) == {"error"}
        assert finished.data["error"]["exit_code"] == code
        assert finished.data["error"]["message"] in finished.err


def test_an_unexpected_exception_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_args: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("s2p_deploy.records.read_manifest", explode)
    assert_refused(run("inspect", tmp_path), 1, "RuntimeError", "first line second line", "--debug")
    debugged = run("--debug", "inspect", tmp_path)
    assert debugged.code == 1
    assert "Traceback" in debugged.err


def test_an_interrupt_is_130(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("s2p_deploy.records.read_manifest", interrupt)
    assert_refused(run("inspect", tmp_path), 130, "interrupted")


def model_with(name: str, folder: Path, file: str, **values: object) -> Path:
    """A copy of a small pipeline of a family, one of its configurations changed."""
    shutil.copytree(sibling(name).folder, folder)
    config = json.loads((folder / file).read_text(encoding="utf-8")) | values
    (folder / file).write_text(json.dumps(config), encoding="utf-8")
    if "_class_name" in values:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index |= {"scheduler": ["diffusers", values["_class_name"]]}
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


SCHEDULER, UNET = "scheduler/scheduler_config.json", "unet/config.json"
CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
EULER = {"_class_name": "EulerDiscreteScheduler"}


@pytest.mark.parametrize("recipe", ["w8a8", "ptq", "fp", "ptq-stream"])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("sd3", SCHEDULER, {"use_dynamic_shifting": True}), "dynamic shifting"),
        (("sd3", SCHEDULER, EULER), "flow matching alone"),
        (("sdxl", SCHEDULER, EULER | CONTINUOUS), "timestep_type continuous is not supported"),
        (("sdxl", SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}), "which a StableDiffusionXLPipeline"),
        (("sd2", UNET, {"center_input_sample": True}), "center_input_sample"),
        (("sd2", SCHEDULER, {"prediction_type": "magic"}), "prediction_type given as magic"),
    ],
)
def test_what_no_calibration_can_follow_is_said_before_any_work(
    run: Run, tmp_path: Path, prompts_file: Path, recipe: str, changed: tuple[str, str, dict[str, object]], said: str
) -> None:
    family, file, values = changed
    model = model_with(family, tmp_path / "model", file, **values)
    assert_refused(calibrate(run, tmp_path / "x", prompts_file, model=model, recipe=recipe), 2, said)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("command", ["generate", "validate", "serve"])
def test_a_scheduler_of_another_kind_is_refused_before_any_work(
    run: Run, chain: Chain, prompts_file: Path, tmp_path: Path, command: str
) -> None:
    out, schedule = tmp_path / "x", ["--schedule", "flow-euler:5"]
    arguments: dict[str, list[object]] = {
        "generate": ["--prompt", "p", "--scheduler", "flow-euler", "--out", tmp_path / "x.png"],
        "validate": ["--prompts", prompts_file, "--out", out, *schedule],
        "serve": ["--port", 0, *schedule],
    }
    before = sorted(tmp_path.iterdir())
    done = run(command, chain.engine, *arguments[command])
    assert done.code == 2
    line = done.err.splitlines()[-1]
    assert all(word in line for word in ("s2p-deploy: ", "'flow-euler' is for flow matching", "use pndm, ddim"))
    assert sorted(tmp_path.iterdir()) == before
