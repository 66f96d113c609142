"""benchmarks/engines/adapters.py: its cases, what they read, and the figures it makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.engines.adapters import KINDS, Case, Inputs, cases_of, edge_map, noise_in, row_of
from s2p_deploy.api import as_prompts
from s2p_deploy.metrics import sqnr_db
from s2p_deploy.shapes.checker import read_picture
from s2p_deploy.shapes.scenes import parse


def test_every_case_has_one_without_to_stand_beside() -> None:
    for kind in KINDS.values():
        names = [case.name for case in cases_of(kind, Path("engine"))]
        assert len(names) == len(set(names))
        for case in cases_of(kind, None):
            without = next(other for other in cases_of(kind, None) if other.name == case.like)
            assert (without.loras, without.control, without.image_scale) == ((), None, None)
            assert without.empty == case.empty
            assert names.index(without.name) <= names.index(case.name)
    assert [case.control for case in cases_of(KINDS["shapes"], Path("e"))].count(Path("e")) == 1


def test_pictures_of_the_adapters_are_other_scenes_and_other_colours() -> None:
    prompts = as_prompts("shapes:held_out").prompts
    inputs = Inputs.of(prompts, 4)
    assert inputs.prompts == prompts[:4]
    assert len(inputs.edges) == len(inputs.scenes) == 4
    for prompt, picture in zip(inputs.prompts, inputs.scenes, strict=True):
        seen, wanted = read_picture(np.asarray(picture)).objects, parse(prompt.text).objects
        assert {(item.place, item.shape) for item in seen} == {(item.place, item.shape) for item in wanted}
    colours = [
        [item.colour for item in parse(prompt.text).objects]
        != [item.colour for item in read_picture(np.asarray(picture)).objects]
        for prompt, picture in zip(inputs.prompts, inputs.scenes, strict=True)
    ]
    assert any(colours)


def test_edges_are_where_the_colour_changes() -> None:
    picture = np.zeros((1, 4, 8, 3), np.uint8)
    picture[:, :, 4:] = 200
    assert edge_map(picture)[0, 0, :, 0].tolist() == [0, 0, 0, 255, 255, 0, 0, 0]
    assert not edge_map(np.full((1, 4, 4, 3), 90, np.uint8)).any()


def test_noise_has_the_power_that_was_asked_for_and_ends() -> None:
    network, clean = torch.nn.Module(), torch.randn(4, 3, 32, 32) * torch.tensor([0.1, 1.0, 5.0, 9.0]).view(4, 1, 1, 1)
    network.forward = lambda: (clean,)
    with noise_in(network, 35.0):
        found = sqnr_db(clean.numpy(), network()[0].numpy())
    np.testing.assert_allclose(found, 35.0, atol=0.3)
    assert network()[0] is clean


def test_figures_by_hand() -> None:
    scores = {"without": np.array([40.0, 42.0, 44.0]), "with": np.array([41.0, 40.0, 41.0])}
    row = row_of(Case("with"), scores)
    assert row["psnr"][0] == 41.0
    assert row["worst"] == 40.0
    assert row["median_less_that_without"] == -1.0
    assert row["per_picture"][0] == -2.0
