"""Full-size configurations, on the meta device: layer lists, and where every weight goes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.full_size.pipeline import ORIGINALS, SD3, SD_V1, SDXL
from s2p_deploy.families import discover_layers, indexed_skeleton, network_config, weight_destinations
from s2p_deploy.records import TimestepTable

# Configurations of published models that differ from an original's: which one, and in what.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3.5-medium": (
        "sd3",
        SD3
        | {
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
            "sample_size": 128,
            "pos_embed_max_size": 384,
        },
    ),
    "sd3.5-large": (
        "sd3",
        SD3 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
    ),
    "sd15-inpainting": ("sd14", SD_V1 | {"in_channels": 9}),
    "sdxl-inpainting": ("sdxl", SDXL | {"in_channels": 9}),
    "lcm": ("sd14", SD_V1 | {"time_cond_proj_dim": 256}),
    "refiner": (
        "sdxl",
        SDXL
        | {
            "block_out_channels": (384, 768, 1536, 1536),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (6, 12, 24, 24),
            "transformer_layers_per_block": 4,
            "cross_attention_dim": 1280,
            "projection_class_embeddings_input_dim": 2560,
        },
    ),
}


def network(name: str) -> torch.nn.Module:
    kind, config = VARIANTS.get(name) or (name, ORIGINALS[name].config)
    with torch.device("meta"):
        return ORIGINALS[kind].denoiser(**config)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd14", {"denoiser": 832, "time table": 28}),
        ("sd21", {"denoiser": 838, "time table": 28}),
        ("sdxl", {"denoiser": 2543, "conditioning": 25}),
        ("sd3", {"denoiser": 1401, "conditioning": 683}),
        ("sd3.5-medium", {"denoiser": 1694, "conditioning": 776}),
        ("sd3.5-large", {"denoiser": 5442, "conditioning": 2704}),
        ("sd15-inpainting", {"denoiser": 832, "time table": 28}),
        ("sdxl-inpainting", {"denoiser": 2543, "conditioning": 25}),
        ("lcm", {"denoiser": 832, "conditioning": 28}),
        ("refiner", {"denoiser": 2213, "conditioning": 46}),
    ],
)
def test_every_weight_has_a_destination(name: str, expected: dict[str, int]) -> None:
    """In millions of elements."""
    original = network(name)
    destinations = weight_destinations(network_config(original))
    elements = {key: tensor.numel() for key, tensor in original.state_dict().items()}
    assert destinations.keys() == elements.keys()
    millions: Counter[str] = Counter()
    for key, destination in destinations.items():
        millions[destination] += elements[key]
    assert {destination: round(count / 1e6) for destination, count in millions.items()} == expected
    elsewhere = (key for key, destination in destinations.items() if destination != "denoiser")
    assert all("time" in key or "add_embedding" in key or "norm" in key for key in elsewhere)


@pytest.mark.parametrize(
    ("name", "convs", "linears", "text"),
    [
        ("sd14", 98, 160, 32),
        pytest.param("sdxl", 51, 722, 140, marks=pytest.mark.slow),
        ("sd3", 1, 287, 1),
        ("sd3.5-medium", 1, 339, 1),
        pytest.param("sd3.5-large", 1, 455, 1, marks=pytest.mark.slow),
    ],
)
def test_layer_lists_of_the_full_size_models(name: str, convs: int, linears: int, text: int) -> None:
    timesteps = TimestepTable("none", {}, 1, (0.0,), np.zeros(1))
    layers = discover_layers(indexed_skeleton(network_config(network(name)), timesteps).denoiser)
    assert Counter(layer.op for layer in layers) == {"conv": convs, "linear": linears}
    assert sum(layer.reads == "text" for layer in layers) == text
    assert [layer.name for layer in layers if layer.reads == "sample"] == [layers[0].name]
    assert [layer.name for layer in layers if layer.last] == [layers[-1].name]
