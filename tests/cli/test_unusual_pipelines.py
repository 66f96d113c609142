"""Pipelines as people have them: unusual and damaged ones work as in diffusers, or are refused in one line."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.cli.commands import Run
from tests.shared_folder import SharedFolder
from tests.small_pipelines import tiny_base

Change = Callable[[Path], object]
UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER, TOKENIZER, INDEX = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "model_index.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
ABSENT = object()


def config(file: str, **values: object) -> Change:
    """Sets values of a JSON file; ABSENT takes one away."""

    def change(folder: Path) -> None:
        data = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        data = {key: value for key, value in (data | values).items() if value is not ABSENT}
        (folder / file).write_text(json.dumps(data))

    return change


def content(file: str, content: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(content)


def conv(function: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Changes the weights of one convolution."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        name = "down_blocks.0.resnets.0.conv1.weight"
        save_file(tensors | {name: function(tensors[name])}, folder / WEIGHTS)

    return change


def gone(file: str, then: Callable[[Path], object] = lambda _: None) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        then(folder / file)

    return change


def vocabulary(folder: Path) -> None:
    file = folder / "tokenizer" / "tokenizer.json"
    read = json.loads(file.read_text())
    read["added_tokens"].append(read["added_tokens"][0] | {"id": 10**6, "content": "<far>"})
    file.write_text(json.dumps(read))


WORKS: dict[str, Change] = {
    "no safety checker": config(INDEX, safety_checker=[None, None]),
    "no word of a safety checker": config(INDEX, safety_checker=ABSENT, feature_extractor=ABSENT),
    "asks for a safety checker that is not there": config(INDEX, requires_safety_checker=True),
    "heads by block": config(UNET, attention_head_dim=[4, 4]),
    "another activation": config(UNET, act_fn="gelu"),
    "attention in float32": config(UNET, upcast_attention=True),
    "layers by block": config(UNET, layers_per_block=[1, 1]),
    "transformers by block": config(UNET, transformer_layers_per_block=[1, 1]),
    "no scaling factor of the autoencoder": config(VAE, scaling_factor=ABSENT),
    "another class in the scheduler's file than in the index": config(SCHEDULER, _class_name="DDIMScheduler"),
    "trained on 100 timesteps": config(SCHEDULER, num_train_timesteps=100),
    "an offset that the pipeline corrects": config(SCHEDULER, steps_offset=5000),
    "a text encoder without architectures": config(TEXT, architectures=ABSENT),
    "a layer of zeros": conv(torch.zeros_like),
    "denormal weights": conv(lambda weight: weight * 1e-40),
    "a configuration that is a link": gone(UNET, lambda path: path.symlink_to(path.parents[1] / "kept.json")),
}
OF_TWO_MODELS = "they are of two models"
REFUSED: dict[str, tuple[Change, str]] = {
    "an index without a class": (config(INDEX, _class_name=ABSENT), "names no class of pipeline"),
    "an index with an unknown component": (config(INDEX, extra=["diffusers", "Whatever"]), "the extra is a Whatever"),
    "an index without a denoiser": (config(INDEX, unet=[None, None]), "has no unet"),
    "an index with a byte order mark": (
        lambda folder: (folder / INDEX).write_bytes(b"\xef\xbb\xbf" + (folder / INDEX).read_bytes()),
        "model_index.json cannot be read as JSON",
    ),
    "an autoencoder of another class": (config(INDEX, vae=["diffusers", "AutoencoderTiny"]), "AutoencoderTiny"),
    "a network in the scheduler's place": (config(INDEX, scheduler=["transformers", "CLIPTextModel"]), "scheduler"),
    "no size": (config(UNET, sample_size=None), "sample_size=None"),
    "a size in words": (config(UNET, sample_size="8"), "sample_size='8'"),
    "a negative size": (config(UNET, sample_size=-8), "sample_size=-8"),
    "heads of no width": (config(UNET, attention_head_dim=0), "makes no UNet2DConditionModel"),
    "heads of null": (config(UNET, attention_head_dim=None), "makes no UNet2DConditionModel"),
    "five input channels": (config(UNET, in_channels=5), "5 channels"),
    "classes": (config(UNET, num_class_embeds=10), "num_class_embeds=10"),
    "a class embedding": (config(UNET, class_embed_type="timestep"), "class_embed_type='timestep'"),
    "additions without widths": (config(UNET, addition_embed_type="text_time"), "makes no UNet2DConditionModel"),
    "groups that do not divide": (config(UNET, norm_num_groups=7), "divisible by num_groups (7)"),
    "channels of four blocks": (config(UNET, block_out_channels=[8, 16, 32, 64]), "block_out_channels"),
    "an unknown block": (config(UNET, down_block_types=["NoBlock2D", "DownBlock2D"]), "NoBlock2D"),
    "an unknown activation": (config(UNET, act_fn="swosh"), "swosh"),
    "no middle": (config(UNET, mid_block_type=None), OF_TWO_MODELS),
    "two attentions side by side": (config(UNET, dual_cross_attention=True), "lacks down_blocks"),
    "a projection of the text": (
        config(UNET, encoder_hid_dim=64, encoder_hid_dim_type="text_proj"),
        "encoder_hid_dim_type='text_proj'",
    ),
    "time that scales": (config(UNET, resnet_time_scale_shift="scale_shift"), OF_TWO_MODELS),
    "time by random frequencies": (config(UNET, time_embedding_type="fourier"), "lacks time_proj.weight"),
    "linear projections": (config(UNET, use_linear_projection=True), OF_TWO_MODELS),
    "another first kernel": (config(UNET, conv_in_kernel=5), "conv_in.weight is [8, 4, 3, 3]"),
    "a centred sample": (config(UNET, center_input_sample=True), "center_input_sample"),
    "gated attention": (config(UNET, attention_type="gated"), "lacks down_blocks"),
    "a padding of null": (config(UNET, downsample_padding=None), "makes a network that cannot be run"),
    "an epsilon in words": (config(UNET, norm_eps="small"), "norm_eps='small': write a number"),
    "an epsilon that is no number": (config(UNET, norm_eps=float("nan")), "holds NaN"),
    "an endless configuration": (
        content(UNET, b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        "cannot be read as JSON",
    ),
    "an empty configuration": (content(UNET, b""), "config.json cannot be read as JSON"),
    "a configuration that is a folder": (gone(UNET, Path.mkdir), "config.json cannot be read as JSON"),
    "a scaling factor of null": (config(VAE, scaling_factor=None), "scaling_factor=None: write a number above 0"),
    "a scaling factor of zero": (config(VAE, scaling_factor=0), "scaling_factor=0"),
    "an autoencoder of eight channels": (config(VAE, latent_channels=8), OF_TWO_MODELS),
    "no scheduler's file": (gone(SCHEDULER), "scheduler_config.json"),
    "unknown betas": (config(SCHEDULER, beta_schedule="foo"), "foo is not implemented"),
    "trained on no timestep": (config(SCHEDULER, num_train_timesteps=0), "cannot be loaded by diffusers"),
    "timesteps in words": (config(SCHEDULER, num_train_timesteps="1000"), "cannot be loaded by diffusers"),
    "betas above one": (config(SCHEDULER, beta_end=2.0), "values that are no numbers"),
    "an unknown prediction": (config(SCHEDULER, prediction_type="foo"), "prediction_type given as foo"),
    "two betas": (config(SCHEDULER, trained_betas=[0.1, 0.2]), "cannot do 50 steps"),
    "a text encoder whose heads do not divide": (config(TEXT, hidden_size=33), "makes no CLIPTextModel"),
    "fewer positions than tokens": (config(TEXT, max_position_embeddings=4), "takes 4: they are of two models"),
    "a tokenizer without a length": (config(TOKENIZER, model_max_length=ABSENT), "model_max_length=None"),
    "a tokenizer of endless texts": (config(TOKENIZER, model_max_length=10**30), "write the encoder's length"),
    "a tokenizer of no tokens": (config(TOKENIZER, model_max_length=0), "model_max_length=0"),
    "a tokenizer longer than its encoder": (config(TOKENIZER, model_max_length="77"), "77 tokens"),
    "a tokenizer with more words than its encoder": (vocabulary, "gives tokens up to 1000000"),
    "weights of no byte": (content(WEIGHTS, b""), "is damaged or not whole"),
    "weights that are a folder": (gone(WEIGHTS, Path.mkdir), "safetensors is missing"),
    "weights that are a link to nowhere": (gone(WEIGHTS, lambda path: path.symlink_to("/no/where")), "is missing"),
    "a header of 2^60 bytes": (content(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"), "is damaged or not whole"),
    "a header of nothing": (content(WEIGHTS, struct.pack("<Q", 2) + b"{}"), "lacks conv_in.bias"),
    "complex weights": (conv(lambda weight: weight.to(torch.complex64)), "is C64"),
    "weights of eight bits": (conv(lambda weight: weight.to(torch.float8_e4m3fn)), "is F8_E4M3"),
    "weights of double precision": (conv(lambda weight: weight.double()), "is F64"),
    "a pickle by another name": (content(WEIGHTS, b"PK\x03\x04" + bytes(200)), "is damaged or not whole"),
    "guidance in words": (config("sampling.json", guidance_scale="high"), "guidance_scale='high'"),
    "no guidance": (content("sampling.json", b"{}"), "guidance_scale=None"),
    "negative guidance": (config("sampling.json", guidance_scale=-1), "guidance_scale=-1"),
}


@pytest.fixture(scope="session")
def tiny(shared: SharedFolder) -> Path:
    return shared.made("tiny-pipeline", tiny_base)


@pytest.fixture
def pipeline(tiny: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "a pipeline's folder, ü"
    shutil.copytree(tiny, folder)
    shutil.copy(folder / UNET, folder / "kept.json")
    return folder


def test_there_are_many() -> None:
    assert len(WORKS) + len(REFUSED) > 70


@pytest.mark.parametrize("name", WORKS)
def test_works(name: str, pipeline: Path, run: Run, tmp_path: Path) -> None:
    WORKS[name](pipeline)
    finished = run("calibrate", pipeline, "--recipe", "ptq-stream", "--out", tmp_path / "calib")
    assert finished.code == 0, finished.err


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_in_one_line(name: str, pipeline: Path, run: Run, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    change(pipeline)
    finished = run("calibrate", pipeline, "--recipe", "ptq-stream", "--out", tmp_path / "calib")
    assert finished.code == 2, finished.err
    lines = [line for line in finished.err.splitlines() if line.startswith("s2p-deploy: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert not any((tmp_path / name).exists() for name in ("calib", "calib.partial"))


FILES = (UNET, VAE, TEXT, SCHEDULER, TOKENIZER, INDEX, "sampling.json")
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 7, 10**6, 10**30, 0.5, -0.5, 1e-30, 1e300])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "x", "8", "linear", "epsilon"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=1),
    max_leaves=3,
)
FURTHER = {
    SCHEDULER: ["timestep_spacing", "use_karras_sigmas", "rescale_betas_zero_snr", "trained_betas"],
    UNET: ["num_attention_heads", "class_embed_type", "time_cond_proj_dim", "addition_embed_type"],
}


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(FILES), data=st.data())
def test_no_value_of_a_configuration_is_an_internal_error(
    tiny: Path, run: Run, tmp_path_factory: pytest.TempPathFactory, file: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzzed")
    shutil.copytree(tiny, folder / "pipeline")
    keys = [*json.loads((folder / "pipeline" / file).read_text()), *FURTHER.get(file, []), "added"]
    config(file, **{data.draw(st.sampled_from(keys)): data.draw(VALUES)})(folder / "pipeline")
    finished = run("calibrate", folder / "pipeline", "--recipe", "ptq-stream", "--out", folder / "calib")
    assert finished.code in {0, 2}, finished.err
    shutil.rmtree(folder)
