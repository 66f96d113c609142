"""Pipelines without one of their text encoders: engines of them are made where diffusers draws with such a pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, UNet2DConditionModel

from s2p_deploy.calib import calibrate
from s2p_deploy.engines import build_engine
from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.families import BasePipeline, load_pipeline, resolve_base
from s2p_deploy.pipeline import Schedule, generate, open_pipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Prompt
from tests.small_pipelines import PIPELINES, put_small_autoencoder, sibling, t5_base
from tests.tiny_networks import tiny_sdxl_unet

WIDTH = 96  # of the second encoder's states, and of its pooled text


def without(folder: Path, source: str, number: str) -> Path:
    """Copies a pipeline, but for one text encoder and its tokenizer; ``number`` is "", "_2" or "_3"."""
    gone = {f"text_encoder{number}", f"tokenizer{number}"}
    shutil.copytree(PIPELINES / source, folder, ignore=shutil.ignore_patterns(*gone))
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {name: [None, None] for name in gone}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def second_encoder_alone(folder: Path) -> BasePipeline:
    """An SDXL whose random UNet reads the second encoder alone."""
    without(folder, "shapes-sdxl", "")
    shutil.rmtree(folder / "unet")
    put_small_autoencoder(folder)
    torch.manual_seed(0)
    changed = {"cross_attention_dim": WIDTH, "projection_class_embeddings_input_dim": WIDTH + 6 * 4}
    UNet2DConditionModel.from_config(dict(tiny_sdxl_unet().config) | changed).save_pretrained(folder / "unet")
    return resolve_base(str(folder))


@pytest.mark.slow  # a trace
def test_sdxl_without_its_first_encoder_goes_the_whole_way(tmp_path: Path) -> None:
    base = second_encoder_alone(tmp_path / "pipeline")
    model = calibrate(base, Recipe.load("fp", {"sampling": {"steps": 4}}), None, tmp_path / "calib")
    engine = build_engine(export_graph(model, tmp_path / "graph"), tmp_path / "engine", backend="onnxruntime")
    floating, prompt = load_pipeline(base), Prompt("id", "a red circle", "blue")
    assert floating.text_encoder is None
    options = {"schedule": Schedule(4), "guidance_scale": 2.0}
    with open_pipeline(engine, base) as opened:
        found, expected = (np.asarray(generate(pipe, prompt, **options)) for pipe in (opened.pipe, floating))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_sdxl_without_its_second_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no text_encoder_2, which its StableDiffusionXLPipeline needs"):
        resolve_base(str(without(tmp_path / "pipeline", "shapes-sdxl", "_2")))


def test_sd3_draws_with_its_third_encoder_or_without(tmp_path: Path) -> None:
    options = {"num_inference_steps": 2, "max_sequence_length": 8, "output_type": "latent"}
    for base in (sibling("sd3"), t5_base(tmp_path / "third")):
        assert torch.isfinite(load_pipeline(base)("a red circle", **options).images).all()


@pytest.mark.parametrize("number", ["", "_2"])
def test_sd3_without_one_of_its_first_two_encoders_is_refused_as_diffusers_cannot_draw_with_it(
    tmp_path: Path, number: str
) -> None:
    folder = without(tmp_path / "pipeline", "shapes-sd3", number)
    with pytest.raises(InputError, match=f"has no text_encoder{number}, which its StableDiffusion3Pipeline needs"):
        resolve_base(str(folder))
    gone = {f"{part}{one}": None for part in ("text_encoder", "tokenizer") for one in (number, "_3")}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **gone)
    with pytest.raises(TypeError, match="NoneType"):
        pipe("a red circle", num_inference_steps=1, max_sequence_length=8)
