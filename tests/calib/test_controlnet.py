"""A ControlNet through all stages: calibrated, exported, built, and in the place of diffusers' own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, SD3ControlNetModel

from s2p_deploy import api
from s2p_deploy.calib.controlnet import calibrate_controlnet
from s2p_deploy.context import Context
from s2p_deploy.errors import InputError
from s2p_deploy.families import load_pipeline
from s2p_deploy.families.controlnets import load_controlnet
from s2p_deploy.pipeline import Control, EngineControlNet, Schedule, generate, open_controlnet, open_pipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Prompt, PromptSet
from s2p_deploy.records.exported_graph import CONTROL_FILE
from tests.small_controlnets import control_picture, small_controlnet
from tests.small_pipelines import sibling, tiny_base

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.families import BasePipeline

PROMPTS = PromptSet((Prompt("a", "a large red circle, white background"), Prompt("b", "a small blue square")))
QUICK = {"sampling": {"steps": 6}, "dataset": {"prompts": 2, "samples_per_prompt": 6}}
PICTURES = [control_picture(0), control_picture(1)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BasePipeline:
    return tiny_base(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="module")
def folder(base: BasePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controlnet") / "edges"
    small_controlnet(load_pipeline(base).unet).save_pretrained(folder)
    return folder


def sqnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (found - expected).square().sum()))


def residuals(network: ControlNetModel, **options: object) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, 128, generator=generator)
    drawn = np.stack([np.asarray(picture) for picture in PICTURES])  # calibrated with these
    picture = torch.from_numpy(drawn).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        down, middle = network(sample, torch.tensor(501), text, picture, return_dict=False, **options)
    return [*down, middle]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "least"), [("w8a8", 15.0), ("w4a8", 6.0), ("fp", 90.0)])
def test_a_calibrated_one_takes_the_place_of_diffusers_own(
    base: BasePipeline, folder: Path, tmp_path: Path, recipe: str, least: float
) -> None:
    overrides = QUICK | ({"training": {"iterations": 4, "selection": {"prompts": 0}}} if recipe == "w4a8" else {})
    model = calibrate_controlnet(base, folder, Recipe.load(recipe, overrides), PROMPTS, PICTURES, tmp_path / "calib")
    planned = {layer.name: layer for layer in model.plan.layers}
    assert planned["controlnet_mid_block"].activation_quantizer is None
    assert any(layer.activation_quantizer for layer in model.plan.layers) == (recipe != "fp")
    scales = model.scales.scales[list(model.scales.calibrated)]
    assert recipe == "fp" or (scales.std(0) > 0).any()  # scales per timestep
    for adapters in ({"lora_rank": 2}, {"controlnet": True}, {"image_tokens": 4}):
        with pytest.raises(InputError, match=r"a ControlNet's calibration, .*: leave --"):
            api.export_graph(model, out=tmp_path / "graph", **adapters)
    graph = api.export_graph(model, out=tmp_path / "graph")
    built = api.build_engine(graph, backend="onnxruntime", out=tmp_path / "engine")
    assert CONTROL_FILE in built.manifest.files
    own, found = (
        load_controlnet(folder, base.denoiser_config(), 8),
        open_controlnet(built.folder, base.denoiser_config(), 8),
    )
    assert isinstance(found, EngineControlNet)
    assert isinstance(found, ControlNetModel)
    for options in ({}, {"conditioning_scale": 0.5}, {"guess_mode": True}):
        for one, other in zip(residuals(found, **options), residuals(own, **options), strict=True):
            assert sqnr(one, other) > least
    found.close()


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "least"), [("w8a8", 15.0), ("fp", 90.0)])
def test_one_of_sd3_takes_the_place_of_diffusers_own(tmp_path: Path, recipe: str, least: float) -> None:
    base, folder = sibling("sd3"), tmp_path / "edges"
    pipe = load_pipeline(base)
    small_controlnet(pipe.transformer).save_pretrained(folder)
    short = {"sampling": {"steps": 4, "max_sequence_length": 8}, "dataset": {"prompts": 2, "samples_per_prompt": 4}}
    calibrated = calibrate_controlnet(base, folder, Recipe.load(recipe, short), PROMPTS, PICTURES, tmp_path / "calib")
    planned = {layer.name: layer for layer in calibrated.plan.layers}
    assert planned["controlnet_blocks.1"].activation_quantizer is None
    assert not any(name.startswith("transformer_blocks.1.ff_context") for name in planned), "nothing reads it"
    assert any(layer.activation_quantizer for layer in calibrated.plan.layers) == (recipe != "fp")
    built = api.build_engine(
        api.export_graph(calibrated, out=tmp_path / "graph"), backend="onnxruntime", out=tmp_path / "engine"
    )
    own, found = (open_controlnet(one, base.denoiser_config(), pipe.vae_scale_factor) for one in (folder, built.folder))
    assert isinstance(found, EngineControlNet)
    assert isinstance(found, SD3ControlNetModel)
    random, config = torch.Generator().manual_seed(0), own.config
    given = {
        "hidden_states": torch.randn(2, config.in_channels, 8, 8, generator=random),
        "controlnet_cond": torch.randn(2, config.in_channels, 8, 8, generator=random) / 2,
        "encoder_hidden_states": torch.randn(2, calibrated.tokens, config.joint_attention_dim, generator=random),
        "pooled_projections": torch.zeros(2, config.pooled_projection_dim),
        "timestep": torch.full((2,), calibrated.timesteps.covered[1]),
        "conditioning_scale": 0.5,
    }
    with torch.no_grad():
        (expected,), (residuals,) = (network(**given, return_dict=False) for network in (own, found))
        assert len(found(**given).controlnet_block_samples) == len(expected) == 2
    for one, other in zip(residuals, expected, strict=True):
        assert one.shape == other.shape
        assert sqnr(one, other) > least
    drawn = [
        generate(
            pipe,
            PROMPTS.prompts[0],
            schedule=Schedule(4, max_sequence_length=8),
            guidance_scale=2.0,
            seed=1,
            controls=[Control(network, PICTURES[0], 0.7)],
        )
        for network in (own, found)
    ]
    difference = np.abs(np.subtract(*(np.asarray(picture, int) for picture in drawn)))
    assert difference.max() <= (1 if recipe == "fp" else 64)
    found.close()


@pytest.mark.slow
def test_a_stopped_calibration_goes_on_to_the_same_bytes(base: BasePipeline, folder: Path, tmp_path: Path) -> None:
    """Stopped once in the walk and once in the training; another request does not take the work over, nor drop it."""
    training = {"iterations": 4, "selection": {"prompts": 0}}
    recipe = Recipe.load("w4a8", QUICK | {"training": training})
    whole = calibrate_controlnet(base, folder, recipe, PROMPTS, PICTURES, tmp_path / "whole")
    out, stages = tmp_path / "stopped", []

    def stopping_at(wanted: str) -> Context:
        def progress(stage: str, done: int, _total: int) -> None:
            stages.append(stage)
            if stage == wanted and done >= 1:
                raise KeyboardInterrupt

        return Context(progress=progress)

    for stage in ("walk", "training"):
        with pytest.raises(KeyboardInterrupt):
            calibrate_controlnet(base, folder, recipe, PROMPTS, PICTURES, out, context=stopping_at(stage))
        with pytest.raises(InputError, match="holds unfinished work with another control pictures"):
            calibrate_controlnet(base, folder, recipe, PROMPTS, PICTURES[:1], out)
    stages.clear()
    found = calibrate_controlnet(base, folder, recipe, PROMPTS, PICTURES, out, context=stopping_at("never"))
    assert "walk" not in stages
    for name in ("weights.safetensors", "act_scales.safetensors", "weight_scales.safetensors", CONTROL_FILE):
        assert found.manifest.files[name] == whole.manifest.files[name], name
    stages.clear()
    again = calibrate_controlnet(base, folder, recipe, PROMPTS, PICTURES, out, context=stopping_at("never"))
    assert again.manifest == found.manifest
    assert stages == []
    with pytest.raises(InputError, match="made by another request \\(it differs in control pictures"):
        calibrate_controlnet(base, folder, recipe, PROMPTS, PICTURES[:1], out)


@pytest.mark.slow
def test_pictures_drawn_with_it(base: BasePipeline, folder: Path, tmp_path: Path) -> None:
    """Both floating-point engines: the stock pipeline draws what it draws with diffusers' own networks."""
    model = calibrate_controlnet(base, folder, Recipe.load("fp", QUICK), PROMPTS, PICTURES, tmp_path / "calib")
    built = api.build_engine(api.export_graph(model, out=tmp_path / "graph"), backend="onnxruntime", out=tmp_path / "e")
    denoiser = api.calibrate(base, recipe="fp", out=tmp_path / "unet")
    graph = api.export_graph(denoiser, out=tmp_path / "unet-graph", controlnet=True)
    engine = api.build_engine(graph, backend="onnxruntime", out=tmp_path / "unet-engine")
    stock = load_pipeline(base)
    networks = [open_controlnet(one, base.denoiser_config(), 8) for one in (folder, built.folder)]
    pictures = []
    with open_pipeline(engine, base) as opened:
        for pipe, network in ((stock, networks[0]), (opened.pipe, networks[1])):
            for count in (1, 2):
                controls = [Control(network, picture, 0.7) for picture in PICTURES[:count]]
                given = {"schedule": Schedule(4, "ddim"), "guidance_scale": 2.0, "seed": 1, "controls": controls}
                pictures.append(np.asarray(generate(pipe, PROMPTS.prompts[0], **given)).astype(int))
        with pytest.raises(InputError, match="is an engine of a ControlNet: give it beside"):
            open_pipeline(built, base)
    assert np.abs(pictures[0] - pictures[2]).max() <= 1
    assert np.abs(pictures[1] - pictures[3]).max() <= 1
    assert not np.array_equal(pictures[0], pictures[1])
    with pytest.raises(InputError, match="is no engine of a ControlNet"):
        open_controlnet(engine.folder, base.denoiser_config(), 8)


def test_what_cannot_be_calibrated_is_refused(base: BasePipeline, folder: Path, tmp_path: Path) -> None:
    recipe, out = Recipe.load("w8a8", QUICK), tmp_path / "out"
    with pytest.raises(InputError, match="give some"):
        calibrate_controlnet(base, folder, recipe, PROMPTS, [], out)
    with pytest.raises(InputError, match="has 32x32 pixels: give pictures of 64x64"):
        calibrate_controlnet(base, folder, recipe, PROMPTS, [control_picture(size=32)], out)
    with pytest.raises(InputError, match="a ControlNet of a StableDiffusionInpaintPipeline cannot be calibrated"):
        calibrate_controlnet(sibling("inpaint"), folder, recipe, PROMPTS, PICTURES, out)
    with pytest.raises(InputError, match=r"is a ControlNet of \{8, 16\} channels of residuals"):
        calibrate_controlnet(sibling("sd3"), folder, recipe, PROMPTS, PICTURES, out)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no PNG, JPEG or WebP files"):
        api.calibrate_controlnet(
            base, controlnet=folder, recipe=recipe, prompts=PROMPTS, pictures=tmp_path / "none", out=out
        )
    assert not out.exists()
