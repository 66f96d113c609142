"""benchmarks/full_size/pipeline.py: the originals' configurations, and small pipelines of each by the same code."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from benchmarks.full_size.pipeline import ORIGINALS, Original, random_tensor, write_original
from s2p_deploy.calib import calibrate
from s2p_deploy.families import resolve_base
from s2p_deploy.recipe import Recipe

PARAMETERS = {"sd14": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684, "sd3": 2_028_328_000}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "norm_num_groups": 4,
}
SMALL: dict[str, dict[str, Any]] = {
    "sd14": UNET | {"cross_attention_dim": 16, "attention_head_dim": 2},
    "sd21": UNET | {"cross_attention_dim": 16, "attention_head_dim": [2, 4], "use_linear_projection": True},
    "sdxl": UNET
    | {
        "cross_attention_dim": 32,
        "attention_head_dim": [2, 4],
        "transformer_layers_per_block": [2, 1],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    },
    "sd3": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 40,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 8,
    },
}
SHARD_BYTES = 20_000


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_configurations_are_the_originals(name: str) -> None:
    with torch.device("meta"):
        denoiser = ORIGINALS[name].denoiser(**ORIGINALS[name].config)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == PARAMETERS[name]


def small(name: str) -> Original:
    return replace(ORIGINALS[name], config=SMALL[name])


@pytest.fixture(scope="module", params=ORIGINALS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Original, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "pipeline"
    write_original(folder, small(request.param), shard_bytes=SHARD_BYTES)
    return small(request.param), folder


@torch.no_grad()
def test_the_stock_pipeline_loads_it_and_draws(written: tuple[Original, Path]) -> None:
    original, folder = written
    no_t5 = {"text_encoder_3": None, "tokenizer_3": None} if original.component == "transformer" else {}
    pipe = original.pipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **no_t5)
    pipe.set_progress_bar_config(disable=True)
    denoiser = pipe.components[original.component]
    for name, tensor in denoiser.state_dict().items():
        assert torch.equal(tensor, random_tensor(name, tuple(tensor.shape)).float()), name
    latents = pipe("a red circle", num_inference_steps=2, output_type="latent")[0]
    assert latents.shape == (1, denoiser.config.in_channels, 8, 8)
    assert bool(latents.isfinite().all())
    assert type(pipe.scheduler) is type(original.scheduler)
    assert pipe.scheduler.config.get("prediction_type") == original.scheduler.config.get("prediction_type")


def test_shards_are_small_and_the_index_names_every_tensor(written: tuple[Original, Path]) -> None:
    original, folder = written
    component = folder / original.component
    index = json.loads((component / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(component.glob("*.safetensors"))
    assert len(shards) > 2
    found, total = {}, 0
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            sizes = [2 * math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118 - no dictionary
            assert sum(sizes) <= SHARD_BYTES or len(sizes) == 1
            found |= dict.fromkeys(opened.keys(), shard.name)
            total += sum(sizes)
    assert index == {"metadata": {"total_size": total}, "weight_map": found}


def test_one_file_where_there_is_room(tmp_path: Path) -> None:
    write_original(tmp_path / "pipeline", small("sd14"))
    files = [file.name for file in (tmp_path / "pipeline" / "unet").iterdir()]
    assert sorted(files) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    with pytest.raises(FileExistsError):
        write_original(tmp_path / "pipeline", small("sd14"))


def test_it_is_streamed_into_a_calibrated_model(written: tuple[Original, Path], tmp_path: Path) -> None:
    _, folder = written
    base = resolve_base(str(folder))
    for name, overrides in (("fp", {}), ("ptq-stream", {"weights": "int4"})):
        model = calibrate(base, Recipe.load(name, overrides), None, tmp_path / name)
        assert model.manifest.content["added_width"] == base.family.added_width(base.denoiser_config())
        assert bool(model.weight_scales()) == bool(model.plan.activation_quantizers) == (name != "fp")
        assert {value.dtype.name for value in model.weights().values()} == {"float32"}
