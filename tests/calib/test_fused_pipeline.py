"""Pipelines with LoRAs in their weights: the numbers of diffusers and PEFT, the record, reuse, and the calibration."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from s2p_deploy.calib import calibrate, fused_pipeline
from s2p_deploy.calib.fused_pipeline import fuse_loras, fused_loras
from s2p_deploy.calib.hooks import PRODUCT
from s2p_deploy.calib.request import CalibrationRequest, claim_unfinished
from s2p_deploy.context import Context
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families import BasePipeline, load_pipeline, load_time_path, resolve_base, with_components
from s2p_deploy.families.checkpoint import Checkpoint
from s2p_deploy.families.lora import GivenLora
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import PromptSet, file_digest, read_prompts
from s2p_deploy.shapes.checker import attribute_accuracy
from s2p_deploy.shapes.scenes import BACKGROUNDS, COLOURS, Scene, caption, parse
from tests.random_loras import RandomLayer, in_kohya, in_old_diffusers, in_peft, random_layers, write_lora
from tests.small_pipelines import sibling, tiny_base

ATTENTION = [
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
]
LINEAR = ["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", "mid_block.resnets.0.time_emb_proj"]
CONVOLUTIONS = ["conv_in", "mid_block.resnets.0.conv1", "mid_block.attentions.0.proj_in"]
TIME = ["time_embedding.linear_1"]
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj", "encoder.layers.1.mlp.fc1"]
EVERYWHERE = {"unet": [*ATTENTION, *LINEAR, *CONVOLUTIONS, *TIME], "text_encoder": TEXT}
TRAINED = Path(__file__).parents[1] / "assets" / "loras" / "next-colour.safetensors"
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
# Names of Stability's code, on which kohya's scripts train SDXL.
STABILITY = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_3_0_skip_connection",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": "input_blocks_3_1_transformer_blocks_1_attn2_to_k",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2": "output_blocks_1_1_transformer_blocks_0_ff_net_2",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_1_2_conv",
    "up_blocks.1.resnets.1.conv2": "output_blocks_3_0_out_layers_3",
}


@cache
def stock(folder: Path) -> DiffusionPipeline:
    """Not to be changed."""
    return load_pipeline(resolve_base(str(folder)))


def fused_by_diffusers(base: BasePipeline, *given: tuple[Path, float]) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of a pipeline's networks that diffusers and PEFT fuse."""
    parts = {name: part for name, part in stock(base.folder).components.items() if name in PARTS and part is not None}
    pipe = with_components(stock(base.folder), {name: copy.deepcopy(part) for name, part in parts.items()})
    names = [f"lora_{number}" for number in range(len(given))]
    for name, (file, _) in zip(names, given, strict=True):
        pipe.load_lora_weights(str(file), adapter_name=name)
    pipe.set_adapters(names, [weight for _, weight in given])
    pipe.fuse_lora(adapter_names=names)
    pipe.unload_lora_weights()
    return {name: pipe.components[name].state_dict() for name in parts}


def written(base: BasePipeline, component: str) -> dict[str, torch.Tensor]:
    [file] = (base.folder / component).glob("*.safetensors")
    return load_file(file)


def assert_as_diffusers_has_it(fused: BasePipeline, base: BasePipeline, *given: tuple[Path, float]) -> None:
    """To the last place of the type that the pipeline's weights are kept in."""
    touched = 0
    for component, theirs in fused_by_diffusers(base, *given).items():
        ours, before = written(fused, component), written(base, component)
        assert ours.keys() == theirs.keys() == before.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == before[name].dtype
            place = torch.finfo(tensor.dtype).eps
            expected = theirs[name].to(tensor.dtype).float()
            torch.testing.assert_close(tensor.float(), expected, rtol=place, atol=2e-7, msg=f"{component} {name}")
            touched += not torch.equal(tensor, before[name])
    assert touched, "nothing was fused"


def with_one_alpha(layers: list[RandomLayer]) -> list[RandomLayer]:
    """diffusers 0.42.1 takes kohya's most frequent alpha for attention layers that have another."""
    return [replace(layer, alpha=2.0) for layer in layers]


def loras_of(base: BasePipeline) -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
    attention, without_mlp = {"unet": ATTENTION, "text_encoder": TEXT}, {"unet": ATTENTION, "text_encoder": TEXT[:2]}
    return {
        "peft": lambda: in_peft(random_layers(base, EVERYWHERE)),
        "peft dora": lambda: in_peft(random_layers(base, {"unet": [*ATTENTION, *LINEAR, *CONVOLUTIONS]}, dora=True)),
        "kohya": lambda: in_kohya(with_one_alpha(random_layers(base, EVERYWHERE))),
        "diffusers": lambda: in_old_diffusers(random_layers(base, attention)),
        "processors": lambda: in_old_diffusers(random_layers(base, without_mlp), processors=True),
    }


@pytest.mark.parametrize("layout", ["peft", "peft dora", "kohya", "diffusers", "processors"])
def test_fused_weights_are_those_of_diffusers(tmp_path: Path, layout: str) -> None:
    base = resolve_base("shapes")
    file = write_lora(tmp_path / "ink.safetensors", loras_of(base)[layout]())
    fused = fuse_loras(base, [GivenLora(file, 0.8)], tmp_path)
    assert_as_diffusers_has_it(fused, base, (file, 0.8))


def test_a_lora_that_was_trained_is_fused_with_the_alphas_of_its_header(tmp_path: Path) -> None:
    base = resolve_base("shapes")
    fused = fuse_loras(base, [GivenLora(TRAINED)], tmp_path)
    assert_as_diffusers_has_it(fused, base, (TRAINED, 1.0))


@pytest.mark.slow
def test_a_lora_that_was_trained_changes_what_is_drawn(tmp_path: Path) -> None:
    """It draws every colour as the next one: see examples/shapes/train_lora.py."""
    base = resolve_base("shapes")
    fused = fuse_loras(base, [GivenLora(TRAINED)], tmp_path)
    texts = [prompt.text for prompt in read_prompts(base.folder / "prompts" / "held_out.jsonl").first(24).prompts]
    accuracies = []
    for which in (fused, base):
        pipe, generator = load_pipeline(which), torch.Generator().manual_seed(0)
        drawn = pipe(texts, num_inference_steps=25, guidance_scale=2.0, generator=generator, output_type="np").images
        pictures = list(np.rint(drawn * 255).astype(np.uint8))
        others = [caption(with_next_colours(parse(text))) for text in texts]
        accuracies.append([attribute_accuracy(pictures, wanted) for wanted in (texts, others)])
    (own, other), (own_before, other_before) = accuracies
    assert other > 0.8 > own
    assert own_before > 0.9
    assert other_before < 0.8


def with_next_colours(scene: Scene) -> Scene:
    objects = [replace(item, colour=after(item.colour, COLOURS)) for item in scene.objects]
    return Scene(tuple(objects), after(scene.background, BACKGROUNDS))


def after(word: str, words: tuple[str, ...]) -> str:
    return words[(words.index(word) + 1) % len(words)]


def test_several_loras_are_fused_in_their_order(tmp_path: Path) -> None:
    """Of a pipeline in float32, to its last place: with a LoRA, a DoRA after it, and a negative weight."""
    base = tiny_base(tmp_path / "pipeline")
    paths = {"unet": [*ATTENTION, *CONVOLUTIONS]}
    files = [
        write_lora(tmp_path / f"{number}.safetensors", in_peft(random_layers(base, paths, dora=dora, seed=number)))
        for number, dora in enumerate((False, True, False))
    ]
    weights = (0.7, 0.5, -0.4)
    fused = fuse_loras(base, [GivenLora(file, weight) for file, weight in zip(files, weights, strict=True)], tmp_path)
    assert_as_diffusers_has_it(fused, base, *zip(files, weights, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), [("sdxl", "kohya"), ("sdxl", "peft"), ("sd3", "peft")])
def test_siblings_are_fused_as_by_diffusers(tmp_path: Path, name: str, layout: str) -> None:
    base = sibling(name)
    encoders = {
        component: [
            tensor.removesuffix(".weight")
            for tensor in Checkpoint(base.folder / component, "model").tensors
            if tensor.endswith(("_proj.weight", "fc2.weight"))
        ]
        for component in ("text_encoder", "text_encoder_2")
    }
    if name == "sdxl":
        paths = {"unet": list(STABILITY)} | encoders
    else:
        shapes = {key: stored.shape for key, stored in Checkpoint(base.denoiser_folder).tensors.items()}
        linear = [key.removesuffix(".weight") for key, shape in shapes.items() if len(shape) == 2]
        paths = {"transformer": linear, **encoders}
    layers = random_layers(base, paths)
    tensors = in_kohya(with_one_alpha(layers), STABILITY) if layout == "kohya" else in_peft(layers)
    file = write_lora(tmp_path / "ink.safetensors", tensors)
    fused = fuse_loras(base, [GivenLora(file, 0.6)], tmp_path)
    assert_as_diffusers_has_it(fused, base, (file, 0.6))


def test_alphas_and_magnitudes_of_kohya_count_by_layer(tmp_path: Path) -> None:
    """What diffusers reads otherwise is held against the definition: W + w · alpha / rank · up @ down."""
    base = tiny_base(tmp_path / "pipeline")
    paths = {"unet": [*ATTENTION, *CONVOLUTIONS]}
    layers = random_layers(base, paths)
    file = write_lora(tmp_path / "ink.safetensors", in_kohya(layers))
    fused, before = written(fuse_loras(base, [GivenLora(file, 0.5)], tmp_path), "unet"), written(base, "unet")
    assert len({layer.alpha for layer in layers}) == 2
    for layer in layers:
        weight = before[f"{layer.path}.weight"]
        product = torch.einsum("or,ri->oi", layer.up.flatten(1), layer.down.flatten(1)).view_as(weight)
        expected = weight + 0.5 * layer.alpha / layer.rank * product
        torch.testing.assert_close(fused[f"{layer.path}.weight"], expected)
    doras = random_layers(base, paths, dora=True)
    kohya, peft = (
        fuse_loras(base, [GivenLora(write_lora(tmp_path / f"{number}.safetensors", tensors))], tmp_path)
        for number, tensors in enumerate((in_kohya(doras), in_peft(doras)))
    )
    for name, tensor in written(kohya, "unet").items():
        torch.testing.assert_close(tensor, written(peft, "unet")[name])


def time_table(base: BasePipeline) -> torch.Tensor:
    return load_time_path(base)(torch.arange(3.0))


@pytest.fixture
def tiny(tmp_path: Path) -> BasePipeline:
    return tiny_base(tmp_path / "pipeline")


def lora_for(base: BasePipeline, folder: Path, name: str = "ink", seed: int = 0) -> Path:
    return write_lora(folder / f"{name}.safetensors", in_peft(random_layers(base, EVERYWHERE, seed=seed)))


def test_a_fused_pipeline_is_one_more_pipeline_that_names_its_loras(tiny: BasePipeline, tmp_path: Path) -> None:
    file = lora_for(tiny, tmp_path)
    fused = fuse_loras(tiny, [GivenLora(file, 0.8)], tmp_path)
    assert fused.folder.parent == tmp_path
    assert fused.base.digest != tiny.base.digest
    assert fused_loras(fused) == [{"file": "ink.safetensors", "sha256": file_digest(file), "weight": 0.8}]
    assert fused_loras(tiny) == []
    assert fused.default_guidance == tiny.default_guidance
    same = [path.relative_to(tiny.folder) for path in tiny.folder.glob("vae/*")]
    assert same
    assert all((fused.folder / path).samefile(tiny.folder / path) for path in same)  # links take no room
    assert not torch.equal(time_table(fused), time_table(tiny))


def test_what_was_fused_before_is_found_again(
    tiny: BasePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [GivenLora(lora_for(tiny, tmp_path), 0.8)]
    first = fuse_loras(tiny, given, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(fused_pipeline, "write_tensor_file", pytest.fail)
        assert fuse_loras(tiny, given, tmp_path) == first
    [weights] = (first.folder / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"] + 1}, weights, {"format": "pt"})
    with pytest.raises(IntegrityError, match=f"delete {first.folder}"):
        fuse_loras(tiny, given, tmp_path)


def test_whatever_decides_the_weights_decides_the_digest(tiny: BasePipeline, tmp_path: Path) -> None:
    one, other = lora_for(tiny, tmp_path), lora_for(tiny, tmp_path, "other", seed=1)
    chains = ([(one, 0.8)], [(one, 0.7)], [(other, 0.8)], [(one, 0.8), (other, 0.8)], [(other, 0.8), (one, 0.8)])
    found = [fuse_loras(tiny, [GivenLora(*each) for each in chain], tmp_path) for chain in chains]
    assert len({base.base.digest for base in found}) == len({base.folder for base in found}) == len(chains)
    twice = fuse_loras(found[0], [GivenLora(other, 0.5)], tmp_path)
    assert [entry["weight"] for entry in fused_loras(twice)] == [0.8, 0.5]


def test_settings_beside_the_file_are_part_of_the_record(tiny: BasePipeline, tmp_path: Path) -> None:
    layers = [replace(layer, component="base_model.model") for layer in random_layers(tiny, {"unet": ATTENTION})]
    file = write_lora(tmp_path / "adapter_model.safetensors", in_peft(layers))
    folders = set()
    for alpha in (2, 4):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}), encoding="utf-8")
        fused = fuse_loras(tiny, [GivenLora(file)], tmp_path)
        assert fused_loras(fused)[0]["settings"] == file_digest(tmp_path / "adapter_config.json")
        folders.add(fused.folder)
    assert len(folders) == 2


def test_fusing_that_fails_leaves_nothing(tiny: BasePipeline, tmp_path: Path) -> None:
    half = tmp_path / "half"
    stock_pipe = load_pipeline(tiny, torch.float16)
    stock_pipe.save_pretrained(half)
    base = resolve_base(str(half))
    file = lora_for(base, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=r"is beyond float16 with .*ink.safetensors:1e\+06: give a smaller weight"):
        fuse_loras(base, [GivenLora(file, 1e6)], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(InputError, match="given twice"):
        fuse_loras(base, [GivenLora(file, 0.5), GivenLora(file, 0.2)], tmp_path)


def test_a_lora_of_another_sibling_is_refused_by_name(tmp_path: Path) -> None:
    xl = sibling("sdxl")
    tensors = in_kohya(
        random_layers(xl, {"text_encoder_2": ["text_model.encoder.layers.0.mlp.fc1"], "unet": ["conv_in"]})
    )
    file = write_lora(tmp_path / "xl.safetensors", tensors, {"ss_base_model_version": "sdxl_base_v1-0"})
    with pytest.raises(InputError, match=r"another model.*sdxl_base_v1-0.*lora_te2_.*a text_encoder_2, which it lacks"):
        fuse_loras(resolve_base("shapes"), [GivenLora(file)], tmp_path)


def test_calibrations_name_their_loras_and_refuse_to_go_on_with_others(
    tiny: BasePipeline, tmp_path: Path, prompts: PromptSet, recipe: Recipe
) -> None:
    file = lora_for(tiny, tmp_path)
    fused, other = (fuse_loras(tiny, [GivenLora(file, weight)], tmp_path) for weight in (0.8, 0.7))
    out, streamed = tmp_path / "calib", Recipe.load("ptq-stream", {"sampling": {"steps": 2}})
    made = calibrate(fused, streamed, None, out)
    assert made.manifest.content["request"]["fused LoRAs"] == fused_loras(fused)
    assert made.manifest.base == fused.base
    assert calibrate(fused, streamed, None, out).manifest == made.manifest
    with pytest.raises(InputError, match="it differs in fused LoRAs and pipeline"):
        calibrate(other, streamed, None, out)
    with pytest.raises(InputError, match="another request"):
        calibrate(tiny, streamed, None, out)
    trained = tmp_path / "trained"
    request = CalibrationRequest(
        fused,
        recipe,
        prompts,
        PromptSet(()),
        PromptSet(()),
        trained,
        None,
        None,
        None,
        replace=False,
        hooks=PRODUCT,
        context=Context(),
    )
    claim_unfinished(request.partial, request.conditions(), replace=False)
    with pytest.raises(InputError, match="unfinished work with another fused LoRAs"):
        calibrate(other, recipe, prompts, trained)
    assert math.isfinite(made.weights()["network.conv_in.weight"].sum())


def test_shards_become_one_file(tiny: BasePipeline, tmp_path: Path) -> None:
    given = [GivenLora(lora_for(tiny, tmp_path))]
    whole = fuse_loras(tiny, given, tmp_path)
    unet = load_pipeline(tiny).unet
    shutil.rmtree(tiny.folder / "unet")
    unet.save_pretrained(tiny.folder / "unet", max_shard_size="20KB")
    assert len(list((tiny.folder / "unet").glob("*.safetensors"))) > 1
    fused = fuse_loras(resolve_base(str(tiny.folder)), given, tmp_path)
    assert fused.folder != whole.folder
    names = sorted(path.name for path in (fused.folder / "unet").iterdir())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
    ours, theirs = written(fused, "unet"), written(whole, "unet")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    assert load_pipeline(fused).unet is not None


def test_a_touched_component_that_is_not_whole_is_refused_where_it_is(tiny: BasePipeline, tmp_path: Path) -> None:
    file = lora_for(tiny, tmp_path)
    weights = tiny.folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_in.bias"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(InputError, match=f"{weights} lacks conv_in.bias"):
        fuse_loras(resolve_base(str(tiny.folder)), [GivenLora(file)], tmp_path)
