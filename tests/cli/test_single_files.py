"""Single files on the command line: options of reading, and one line for what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from s2p_deploy.families import resolve_base
from tests.cli.commands import Run
from tests.single_files import write_single_file

STREAM = ("--recipe", "ptq-stream", "--device", "cpu")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_single_file(tmp_path / "m.safetensors", resolve_base("shapes").folder)


@pytest.mark.slow
def test_a_file_is_calibrated_and_inspected_and_found_by_later_stages(run: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "calib"
    made = run("calibrate", file, "--components", "shapes", "--prediction-type", "epsilon", *STREAM, "--out", out)
    assert made.code == 0, made.err
    shown = run("inspect", out, "--json").data
    assert shown["base"]["source"] == str(file)
    assert shown["base"]["options"]["components"] == "shapes"
    assert "components shapes, prediction_type epsilon" in run("inspect", out).out
    exported = run("export", out, "--time-table", "input", "--out", tmp_path / "graph")  # which reads the time path
    assert exported.code == 0, exported.err
    file.unlink()
    missing = run("export", out, "--time-table", "input", "--out", tmp_path / "other")
    assert (missing.code, missing.err.count("\n")) == (2, 1)
    assert "m.safetensors cannot be read" in missing.err


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("calibrate", ()),
        ("dataset", ("--prompts", "shapes:train")),
        ("components", ("--backend", "onnxruntime")),
    ],
)
def test_every_command_refuses_what_is_no_model_in_one_line(
    command: str, more: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}, lora)
    recipe = () if command == "components" else ("--recipe", "fp")
    refused = run(command, lora, *recipe, *more, "--out", tmp_path / "out")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "so it is a LoRA" in refused.err


def test_a_prediction_type_that_there_is_not(run: Run, file: Path, tmp_path: Path) -> None:
    refused = run("calibrate", file, "--prediction-type", "sample", *STREAM, "--out", tmp_path / "out")
    assert refused.code == 2
    assert "'epsilon', 'v_prediction'" in refused.err


def test_a_file_without_a_configuration_of_its_size(run: Run, file: Path, tmp_path: Path) -> None:
    refused = run("calibrate", file, *STREAM, "--out", tmp_path / "out")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "no packaged configuration has such a unet: give the diffusers folder" in refused.err
