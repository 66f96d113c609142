"""``calibrate --lora`` and ``adapt``: their errors in one line, and an engine like another with a LoRA in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from s2p_deploy.families import resolve_base
from s2p_deploy.records import CalibratedModel, Engine, ExportedGraph
from tests.cli.commands import Chain, Run
from tests.cli.test_bad_input import assert_refused
from tests.random_loras import in_kohya, random_layers, write_lora

PATHS = {
    "unet": ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.resnets.0.conv1", "conv_in"],
    "text_encoder": ["encoder.layers.1.self_attn.v_proj"],
}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "ink.safetensors", in_kohya(random_layers(resolve_base("shapes"), PATHS)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere.safetensors", ["nowhere.safetensors", "does not exist"]),
        ("ink.safetensors:nan", ["ink.safetensors", "finite"]),
        ("ink.safetensors:", ["FILE:WEIGHT"]),
    ],
)
def test_a_lora_that_is_none_leaves_nothing(
    run: Run, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("calibrate", "shapes", "--recipe", "ptq-stream", "--out", "calib", "--lora", text)
    assert_refused(run(*command), 2, *words)
    assert list(tmp_path.iterdir()) == [lora]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "e"], ["--like", "--backend"]),
        (["--engine", "e", "--like", "x", "--backend", "openvino"], ["--like", "--backend"]),
        (["--backend", "openvino"], ["--engine"]),
        (["--engine", "e", "--backend", "nothing"], ["nothing", "onnxruntime"]),
        (["--engine", "e", "--like", "nowhere"], ["nowhere", "does not exist"]),
    ],
)
def test_an_engine_needs_one_way_to_be_built(run: Run, options: list[str], words: list[str]) -> None:
    assert_refused(run("adapt", "calib", "--lora", "ink.safetensors", "--out", "new", *options), 2, *words)


def test_adapt_needs_a_lora_and_a_model(run: Run, tmp_path: Path, lora: Path) -> None:
    assert_refused(run("adapt", "calib", "--out", tmp_path / "new"), 2, "--lora")
    assert_refused(run("adapt", "no-such-folder", "--lora", lora, "--out", tmp_path / "new"), 2, "no-such-folder")


def test_a_calibration_says_where_its_pipeline_is(run: Run, tmp_path: Path, lora: Path) -> None:
    out = tmp_path / "calib"
    settings = ("--recipe", "ptq-stream", "--set", "sampling.steps=2")
    made = run("calibrate", "shapes", *settings, "--out", out, "--lora", f"{lora}:0.5", "--json")
    assert made.code == 0, made.err
    base = resolve_base(made.data["pipeline"])
    assert base.base.digest == CalibratedModel.open(out).manifest.base.digest
    assert base.folder.parent == tmp_path
    again = run("calibrate", "shapes", *settings, "--out", out, "--lora", f"{lora}:0.6")
    assert again.code == 2
    assert "another request (it differs in fused LoRAs and pipeline)" in again.err.splitlines()[-1]


@pytest.mark.slow
def test_an_engine_like_another_draws_what_its_pipeline_draws(run: Run, chain: Chain, lora: Path) -> None:
    folder = chain.calib.parent
    made = run(
        *("adapt", chain.calib, "--lora", f"{lora}:0.8", "--out", folder / "new"),
        *("--engine", folder / "new-engine", "--like", chain.engine, "--json"),
    )
    assert made.code == 0, made.err
    engine, like = Engine.open(Path(made.data["engine"]["path"])), Engine.open(chain.engine)
    assert engine.manifest.content["options"] == like.manifest.content["options"]
    assert (engine.backend, engine.dtype, engine.inputs) == (like.backend, like.dtype, like.inputs)
    graph = ExportedGraph.open(folder / "new-engine-graph")
    assert engine.manifest.parents["graph"].digest == graph.manifest.digest
    np.testing.assert_array_equal(engine.scales.scales, like.scales.scales)
    assert engine.manifest.base.digest == resolve_base(made.data["pipeline"]).base.digest
    pictures = []
    for which in (engine.folder, chain.engine):
        picture = folder / f"{which.name}.png"
        drawn = run("generate", which, "--prompt", "a large red circle", "--out", picture)
        assert drawn.code == 0, drawn.err
        pictures.append(torch.from_numpy(np.asarray(Image.open(picture))).float())
    assert not torch.equal(*pictures)
    assert run("inspect", engine.folder).code == 0
    validated = run(
        *(
            "validate",
            engine.folder,
            "--prompts",
            chain.prompts,
            "--out",
            folder / "report",
            "--pictures",
            "2",
            "--json",
        )
    )
    assert validated.code in {0, 3}, validated.err  # so little of a calibration need not meet the gates
