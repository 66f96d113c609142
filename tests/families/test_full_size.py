"""Full-size configurations, on the meta device: layer lists, and where every weight goes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.full_size.pipeline import ORIGINALS
from s2p_deploy.families import discover_layers, indexed_skeleton, network_config, weight_destinations
from s2p_deploy.records import TimestepTable


def network(name: str) -> torch.nn.Module:
    original = ORIGINALS[name]
    with torch.device("meta"):
        return original.denoiser(**original.config)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd14", {"denoiser": 832, "time table": 28}),
        ("sd21", {"denoiser": 838, "time table": 28}),
        ("sdxl", {"denoiser": 2543, "conditioning": 25}),
        ("sd3", {"denoiser": 1401, "conditioning": 683}),
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
    [("sd14", 98, 160, 32), pytest.param("sdxl", 51, 722, 140, marks=pytest.mark.slow), ("sd3", 1, 287, 1)],
)
def test_layer_lists_of_the_full_size_models(name: str, convs: int, linears: int, text: int) -> None:
    timesteps = TimestepTable("none", {}, 1, (0.0,), np.zeros(1))
    layers = discover_layers(indexed_skeleton(network_config(network(name)), timesteps).denoiser)
    assert Counter(layer.op for layer in layers) == {"conv": convs, "linear": linears}
    assert sum(layer.reads == "text" for layer in layers) == text
    assert [layer.name for layer in layers if layer.reads == "sample"] == [layers[0].name]
    assert [layer.name for layer in layers if layer.last] == [layers[-1].name]
