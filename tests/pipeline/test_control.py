"""ControlNets in stock pipelines with an engine: they draw what diffusers' own network draws with them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

from s2p_deploy.calib import calibrate
from s2p_deploy.engines import TorchRunner, build_engine
from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.families import denoiser_of, load_pipeline, with_denoiser
from s2p_deploy.families.controlnets import load_controlnet, with_controlnets
from s2p_deploy.pipeline import (
    Control,
    EngineControlNet,
    EngineUNet,
    Schedule,
    StartPicture,
    controlnet_memory,
    engine_denoiser,
    generate,
    open_controlnet,
    open_pipeline,
)
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine, Prompt, TimestepTable
from tests.small_controlnets import EMBEDDING, OpenedEngines, control_picture, residual_specs, small_controlnet
from tests.small_pipelines import TABLE, sibling

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from s2p_deploy.families import BasePipeline

PROMPT = "a small red circle at the top left, white background"
SCHEDULE = Schedule(3, "ddim")


@pytest.fixture(scope="module")
def controlled(base: StableDiffusionPipeline) -> EngineUNet:
    """The FP UNet behind the runner's interface, with the inputs of an engine exported for ControlNets."""

    def predict(sample: Tensor, index: Tensor, text: Tensor, optional: Mapping[str, Tensor] | None = None) -> Tensor:
        *down, middle = optional.values() if optional else [None]
        return base.unet(
            sample,
            index,
            text,
            down_block_additional_residuals=down or None,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]

    return EngineUNet(TorchRunner(predict), base.unet.config, TABLE, optional=residual_specs(base.unet))


@pytest.fixture(scope="module")
def controlnets(base: StableDiffusionPipeline) -> list[ControlNetModel]:
    return [small_controlnet(base.unet, seed) for seed in (0, 1)]


def with_nets(
    pipe: StableDiffusionPipeline, controlnet: ControlNetModel | list[ControlNetModel]
) -> StableDiffusionControlNetPipeline:
    return StableDiffusionControlNetPipeline(**pipe.components, controlnet=controlnet, requires_safety_checker=False)


def drawn(pipe: DiffusionPipeline, **arguments: object) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    given = {"prompt": PROMPT, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(1)} | arguments
    if "strength" not in arguments:
        given["latents"] = noise
    return np.asarray(pipe(**given, output_type="np").images[0])


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"controlnet_conditioning_scale": 0.5, "guess_mode": True},
        {"control_guidance_start": 0.2, "control_guidance_end": 0.8},
        {"guidance_scale": 1.0},
    ],
    ids=["whole", "guess mode", "from one step to another", "without guidance"],
)
def test_a_stock_pipeline_draws_the_same(
    base: StableDiffusionPipeline, controlled: EngineUNet, controlnets: list[ControlNetModel], asked: dict[str, object]
) -> None:
    pictures = [
        drawn(
            with_nets(pipe, controlnets[0]),
            image=control_picture(),
            **asked,
        )
        for pipe in (base, with_denoiser(base, controlled))
    ]
    np.testing.assert_array_equal(*pictures)
    without = drawn(with_denoiser(base, base.unet), guidance_scale=asked.get("guidance_scale", 7.5))
    assert not np.array_equal(pictures[0], without)


def test_so_does_one_with_several(
    base: StableDiffusionPipeline, controlled: EngineUNet, controlnets: list[ControlNetModel]
) -> None:
    pictures = [
        drawn(
            with_nets(pipe, controlnets),
            image=[control_picture(0), control_picture(1)],
            controlnet_conditioning_scale=[1.0, 0.3],
        )
        for pipe in (base, with_denoiser(base, controlled))
    ]
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_so_do_those_that_start_from_a_picture(
    base: StableDiffusionPipeline, controlled: EngineUNet, controlnets: list[ControlNetModel], task: str
) -> None:
    asked = {"image": control_picture(3), "control_image": control_picture(), "strength": 0.7}
    if task == "Inpaint":
        asked["mask_image"] = control_picture(4).convert("L").point(lambda level: 255 * (level < 128))
    pictures = [
        drawn(with_controlnets(pipe, controlnets[:1], task), **asked)
        for pipe in (base, with_denoiser(base, controlled))
    ]
    np.testing.assert_allclose(*pictures, atol=1e-5)  # encoded once each


@pytest.mark.parametrize("start", [None, "picture", "masked"])
def test_generate_draws_what_the_stock_pipeline_draws(
    base: StableDiffusionPipeline, controlled: EngineUNet, controlnets: list[ControlNetModel], start: str | None
) -> None:
    begin = None if start is None else StartPicture.blank(64, 64, 0.7, masked=start == "masked")
    for controls in ([Control(controlnets[0], control_picture(), 0.8)], []):
        pictures = [
            np.asarray(
                generate(
                    pipe,
                    Prompt("id", PROMPT),
                    schedule=SCHEDULE,
                    guidance_scale=2.0,
                    seed=3,
                    start=begin,
                    controls=controls,
                )
            )
            for pipe in (base, with_denoiser(base, controlled))
        ]
        np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_the_other_kinds_pass_on_their_residuals(name: str) -> None:
    base = load_pipeline(sibling(name))
    network, seen = denoiser_of(base), []

    def predict(sample: Tensor, _index: Tensor, text: Tensor, added: Tensor, optional: Mapping[str, Tensor]) -> Tensor:
        seen.append(optional)
        time = torch.full((len(sample),), 500.0)
        family, kind = engine._family, {"sdxl": "unet", "sd3": "transformer"}[name]
        assert family.component == kind
        return family.predict(network, sample, time, text, added)

    timesteps = np.linspace(1, 1000, 3)
    table = TimestepTable(
        type(base.scheduler).__name__,
        {},
        3,
        tuple(timesteps),
        np.linspace(0, 1, 1001),
        flow_matching=name == "sd3",
        fractional=timesteps,
    )
    engine = engine_denoiser(
        TorchRunner(predict),
        network.config,
        table,
        indices=lambda values: np.zeros(np.size(values), np.int64),
        optional=residual_specs(network),
    )
    controlnet = small_controlnet(network)
    control = Control(controlnet, control_picture())
    given = {"schedule": Schedule(2, max_sequence_length=8), "guidance_scale": 2.0, "controls": [control]}
    ready = with_denoiser(base, engine)
    engine.prepare = lambda _timesteps: None  # type: ignore[method-assign]  # of a table that is none
    generate(ready, Prompt("id", PROMPT), seed=1, **given)
    specs = {spec.name: spec.shape for spec in residual_specs(network)}
    assert [list(one) for one in seen] == [list(specs)] * len(seen)
    for name_, value in seen[0].items():
        places = [size for size in specs[name_] if isinstance(size, int)]
        assert set(places) <= set(value.shape)
        assert value.any()


def test_sd3_residuals_are_spread_over_its_blocks() -> None:
    """As diffusers spreads fewer of them: the network gives the same for both."""
    base = load_pipeline(sibling("sd3"))
    network = base.transformer
    blocks = len(network.transformer_blocks)
    generator = torch.Generator().manual_seed(0)
    few = [torch.randn(2, 16, network.inner_dim, generator=generator) for _ in range(2)]
    engine = engine_denoiser(
        TorchRunner(lambda *_: torch.zeros(1)), network.config, TABLE, optional=residual_specs(network)
    )
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    spread = engine._residuals(sample, {"block_controlnet_hidden_states": few})
    assert list(spread) == [f"block_residual_{number}" for number in range(blocks - 1)]
    text, pooled = (
        torch.zeros(2, 5, network.config.joint_attention_dim),
        torch.zeros(2, network.config.pooled_projection_dim),
    )
    given = [value.flatten(1, 2) for value in spread.values()]
    with torch.no_grad():
        outputs = [
            network(sample, text, pooled, torch.full((2,), 500.0), block_controlnet_hidden_states=states).sample
            for states in (few, [*given, given[-1]])
        ]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_floating_point_engine_draws_what_diffusers_draws(
    base: StableDiffusionPipeline,
    controlnets: list[ControlNetModel],
    origin: BasePipeline,
    tmp_path: Path,
    backend: str,
) -> None:
    model = calibrate(origin, Recipe.load("fp"), None, tmp_path / "calib")
    built = build_engine(export_graph(model, tmp_path / "graph", controlnet=True), tmp_path / "engine", backend=backend)
    stock = load_pipeline(origin)
    with open_pipeline(built) as opened:
        pipe = with_nets(opened.pipe, controlnets[0])
        pictures = [drawn(one, image=control_picture()) for one in (with_nets(stock, controlnets[0]), pipe)]
        without = drawn(opened.pipe)
    np.testing.assert_allclose(*pictures, atol=1e-4)
    assert np.abs(pictures[0] - without).max() > 0.01


def test_an_engine_without_inputs_for_them_refuses_by_name(
    base: StableDiffusionPipeline, denoiser: EngineUNet, controlnets: list[ControlNetModel]
) -> None:
    pipe = with_denoiser(base, denoiser)
    stock = with_nets(pipe, controlnets[0])
    with pytest.raises(InputError, match=r"cannot take down_block_additional_residuals: .*export with --controlnet"):
        drawn(stock, image=control_picture())
    with pytest.raises(InputError, match="takes no ControlNet: export with --controlnet"):
        generate(
            pipe,
            Prompt("id", PROMPT),
            schedule=SCHEDULE,
            guidance_scale=2.0,
            controls=[Control(controlnets[0], control_picture())],
        )


def test_residuals_of_another_kind_of_network_are_refused(controlled: EngineUNet) -> None:
    given = torch.zeros(1, 4, 8, 8), torch.tensor(1), torch.zeros(1, 24, 128)
    one = torch.zeros(1, 8, 8, 8)
    for down, middle in (([one], one), ([one] * 4, None)):
        with pytest.raises(InputError, match="takes 4 residuals of a ControlNet's down blocks and one of its middle"):
            controlled(*given, down_block_additional_residuals=down, mid_block_additional_residual=middle)


def test_pooled_residuals_act_at_all_places(controlled: EngineUNet) -> None:
    given = torch.ones(1, 4, 8, 8), torch.tensor(1), torch.zeros(1, 24, 128)
    pooled = [torch.full((1, channels, 1, 1), 0.5) for channels in (8, 8, 8, 16, 16)]
    whole = [
        value.expand(-1, -1, *sides)
        for value, sides in zip(pooled, [(8, 8), (8, 8), (4, 4), (4, 4), (4, 4)], strict=True)
    ]
    outputs = [
        controlled(*given, down_block_additional_residuals=values[:-1], mid_block_additional_residual=values[-1]).sample
        for values in (pooled, whole)
    ]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale": float("nan")}, "scale of nan is out of range"),
        ({"scale": 11.0}, "scale of 11 is out of range: give one from 0 to 10"),
        ({"start": 0.6, "end": 0.5}, "from 0.6 to 0.5 does not"),
        ({"end": 1.5}, "from 0 to 1.5 does not"),
    ],
)
def test_controls_that_are_none(controlnets: list[ControlNetModel], changed: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Control(controlnets[0], control_picture(), **changed)


def test_a_picture_of_another_size_is_refused(
    base: StableDiffusionPipeline, controlled: EngineUNet, controlnets: list[ControlNetModel]
) -> None:
    with pytest.raises(InputError, match="the control picture has 32x32 pixels, and 64x64 are drawn"):
        generate(
            with_denoiser(base, controlled),
            Prompt("id", PROMPT),
            schedule=SCHEDULE,
            guidance_scale=2.0,
            controls=[Control(controlnets[0], control_picture(size=32))],
        )


def test_controlnets_are_loaded_and_checked(
    base: StableDiffusionPipeline, controlnets: list[ControlNetModel], tmp_path: Path
) -> None:
    config = dict(base.unet.config) | {"_class_name": "UNet2DConditionModel"}
    controlnets[0].save_pretrained(tmp_path / "fits")
    loaded = load_controlnet(tmp_path / "fits", config, 8)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), controlnets[0].parameters(), strict=True))
    with pytest.raises(InputError, match="a ControlNet of 8 pixels per latent, this pipeline's network has 4"):
        load_controlnet(tmp_path / "fits", config, 4)
    other = dict(config) | {"block_out_channels": (8, 24)}
    with pytest.raises(InputError, match=r"of \[8, 8, 8, 16, 16\] channels of residuals, .* has \[8, 8, 8, 24, 24\]"):
        load_controlnet(tmp_path / "fits", other, 8)
    with pytest.raises(InputError, match="is a ControlNet of 128 numbers per token, this pipeline's network has 64"):
        load_controlnet(tmp_path / "fits", dict(config) | {"cross_attention_dim": 64}, 8)


def test_an_engine_that_does_not_fit_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = OpenedEngines()

    def refuse(*_given: object) -> None:
        assert engines.open == 1
        raise InputError("it does not fit")

    monkeypatch.setattr(EngineControlNet, "load", lambda folder, **_options: engines(folder, {}, 8))
    monkeypatch.setattr("s2p_deploy.pipeline.engine_controlnet.residual_maps", lambda _config: [])
    monkeypatch.setattr("s2p_deploy.pipeline.engine_controlnet.check_fits", refuse)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(InputError, match="it does not fit"):
        open_controlnet(tmp_path, {}, 8)
    assert engines.open == 0


def test_the_memory_of_controlnets_is_counted_before_they_are_opened(
    controlnets: list[ControlNetModel], engine: Engine, tmp_path: Path
) -> None:
    controlnets[0].save_pretrained(tmp_path / "whole")
    controlnets[0].save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    numbers, cpu = sum(weight.numel() for weight in controlnets[0].parameters()), torch.device("cpu")
    for folder in ("whole", "shards"):
        assert controlnet_memory(tmp_path / folder, torch.float32, cpu) == (False, 4 * numbers)
        assert controlnet_memory(tmp_path / folder, torch.float16, torch.device("cuda")) == (True, 2 * numbers)
    files = sum((engine.folder / name).stat().st_size for name in engine.engine_files)
    assert controlnet_memory(engine.folder, torch.float32, cpu) == (False, files)


@pytest.mark.parametrize("spoilt", ["missing", "class", "truncated", "nan"])
def test_hostile_controlnets_are_refused_in_one_line(
    base: StableDiffusionPipeline, controlnets: list[ControlNetModel], tmp_path: Path, spoilt: str
) -> None:
    config, folder = dict(base.unet.config) | {"_class_name": "UNet2DConditionModel"}, tmp_path / "net"
    if spoilt != "missing":
        network = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=EMBEDDING)
        if spoilt == "nan":
            network.controlnet_mid_block.bias.data[:] = torch.nan
        network.save_pretrained(folder)
    if spoilt == "class":
        written = json.loads((folder / "config.json").read_text()) | {"_class_name": "T2IAdapter"}
        (folder / "config.json").write_text(json.dumps(written))
    if spoilt == "truncated":
        file = folder / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError) as caught:
        load_controlnet(folder, config, 8)
    assert "\n" not in str(caught.value)


def test_a_family_without_such_a_pipeline_is_told(controlnets: list[ControlNetModel]) -> None:
    base = load_pipeline(sibling("sd3"))
    assert not hasattr(diffusers, "StableDiffusion3ControlNetImg2ImgPipeline")
    with pytest.raises(InputError, match="no ControlNet pipeline like StableDiffusion3Pipeline"):
        with_controlnets(base, controlnets[:1], "Img2Img")
