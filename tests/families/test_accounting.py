"""Full-size configurations, on the meta device: site lists, and where every weight goes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.full_size_pipeline import ORIGINALS
from s2p_deploy.families import discover_sites, hot_skeleton, network_config, weight_places
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
def test_every_weight_has_a_place(name: str, expected: dict[str, int]) -> None:
    """In millions of elements."""
    original = network(name)
    places = weight_places(network_config(original))
    elements = {key: tensor.numel() for key, tensor in original.state_dict().items()}
    assert places.keys() == elements.keys()
    millions: Counter[str] = Counter()
    for key, place in places.items():
        millions[place] += elements[key]
    assert {place: round(count / 1e6) for place, count in millions.items()} == expected
    elsewhere = (key for key, place in places.items() if place != "denoiser")
    assert all("time" in key or "add_embedding" in key or "norm" in key for key in elsewhere)


@pytest.mark.parametrize(
    ("name", "convs", "linears", "text"), [("sd14", 98, 160, 32), ("sdxl", 51, 722, 140), ("sd3", 1, 287, 1)]
)
def test_site_lists_of_the_full_size_models(name: str, convs: int, linears: int, text: int) -> None:
    rows = TimestepTable("none", {}, 1, (0.0,), np.zeros(1))
    sites = discover_sites(hot_skeleton(network_config(network(name)), rows).hot)
    assert Counter(site.op for site in sites) == {"conv": convs, "linear": linears}
    assert sum(site.reads == "text" for site in sites) == text
    assert [site.name for site in sites if site.reads == "sample"] == [sites[0].name]
    assert [site.name for site in sites if site.last] == [sites[-1].name]
