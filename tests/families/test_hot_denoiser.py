from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from sibling_pipelines import sibling
from tiny_networks import TOKENS

from s2p_deploy.families import (
    EncodedText,
    given_features,
    hot_denoiser,
    hot_denoiser_of,
    hot_skeleton,
    kind_of,
    kind_of_config,
    load_pipeline,
    network_config,
    new_hot_denoiser,
    set_time_table,
    time_slices,
    time_table_of,
)
from s2p_deploy.families.network_kind import Config
from s2p_deploy.records import TimestepTable, TimeTable
from s2p_deploy.timesteps import timestep_table_of

FRACTIONAL = np.asarray([8.9285717, 503.25, 900.359])
TABLE = TimestepTable("a scheduler", {}, 3, tuple(FRACTIONAL), np.linspace(0, 1, 1000), fractional=FRACTIONAL)
ROWS = torch.tensor([0, 1001, 421, 1002])  # samples of one batch on different rows, two of them of no whole timestep


def inputs(config: Config, batch: int = len(ROWS)) -> tuple[torch.Tensor, EncodedText]:
    """Samples, and for each a text and ``added_cond`` of its own."""
    kind = kind_of_config(config)
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, 4, 8, 8), (batch, TOKENS, kind.text_width(config)), (batch, kind.added_width(config)))
    sample, states, added = (torch.randn(shape, generator=generator) for shape in shapes)
    return sample, EncodedText(states, added.abs() * 8)


@torch.no_grad()
def test_the_table_draws_what_the_time_path_drew(tiny_unet: UNet2DConditionModel) -> None:
    table = time_table_of(tiny_unet, 1000)
    sample, text = inputs(network_config(tiny_unet), 3)
    rows = torch.tensor([0, 999, 421])
    expected = tiny_unet(sample, rows, text.states).sample
    hot = hot_denoiser(copy.deepcopy(tiny_unet), table)
    assert torch.allclose(hot(sample, rows, text.states), expected, atol=1e-5)
    assert not torch.allclose(hot(sample, rows.flip(0), text.states), expected, atol=1e-3), "the row matters"


@torch.no_grad()
def test_rows_of_a_table_of_timesteps_draw_exactly_what_the_whole_network_drew(network: torch.nn.Module) -> None:
    sample, text = inputs(network_config(network))
    timesteps = torch.from_numpy(TABLE.timesteps).float()[ROWS]
    expected = kind_of(network).answer(network, sample, timesteps, text.states, text.added_cond)
    hot = hot_denoiser(copy.deepcopy(network), TABLE).eval()
    assert torch.equal(hot(sample, ROWS, text.states, text.added_cond), expected)
    assert not torch.allclose(hot(sample, ROWS.flip(0), text.states, text.added_cond), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["sdxl_unet", "mmdit"])
@torch.no_grad()
def test_every_sample_has_the_features_of_its_own_added_cond(request: pytest.FixtureRequest, name: str) -> None:
    network = request.getfixturevalue(name)
    sample, text = inputs(network_config(network))
    hot = hot_denoiser(network, TABLE).eval()
    whole = hot(sample, ROWS, text.states, text.added_cond)
    alone = hot(sample[1:2], ROWS[1:2], text.states[1:2], text.added_cond[1:2])
    assert torch.allclose(whole[1:2], alone, atol=1e-5)
    swapped = hot(sample, ROWS, text.states, text.added_cond.flip(0))
    assert ((swapped - whole).flatten(1).abs().amax(1) > 1e-3).all()


def test_the_weights_of_the_time_path_are_gone(tiny_unet: UNet2DConditionModel) -> None:
    before = sum(parameter.numel() for parameter in tiny_unet.parameters())
    time_path = sum(p.numel() for name, p in tiny_unet.named_parameters() if "time_emb" in name)
    hot = hot_denoiser(tiny_unet, time_table_of(tiny_unet, 10))
    assert sum(parameter.numel() for parameter in hot.parameters()) == before - time_path
    assert not any("time" in name for name, _ in hot.named_parameters())
    assert not any("table" in name for name in hot.state_dict())


def test_a_time_path_beside_the_network_is_not_trained(network: torch.nn.Module) -> None:
    before = sum(parameter.numel() for parameter in network.parameters())
    hot = hot_denoiser(network, TABLE)
    assert sum(parameter.numel() for parameter in hot.parameters()) == before
    moved = {name for name, parameter in hot.named_parameters() if not parameter.requires_grad}
    assert moved == {name for name, _ in hot.named_parameters() if name.startswith("time.path.")} != set()
    assert not any("timesteps" in name for name in hot.state_dict())


def test_a_skeleton_accounts_for_every_tensor_of_the_checkpoint(network: torch.nn.Module) -> None:
    skeleton = hot_skeleton(network_config(network), TABLE)
    checkpoint = network.state_dict()
    assert {tensor.device.type for tensor in skeleton.hot.state_dict().values()} == {"meta"}
    state = hot_denoiser(copy.deepcopy(network), TABLE).state_dict()
    assert set(skeleton.sources) == set(state)
    assert sorted(skeleton.sources.values()) == sorted(checkpoint), "each is taken once"
    assert all(torch.equal(state[name], checkpoint[source]) for name, source in skeleton.sources.items())


def test_a_skeleton_with_a_table_leaves_the_time_path_out(tiny_unet: UNet2DConditionModel) -> None:
    skeleton = hot_skeleton(network_config(tiny_unet), time_table_of(tiny_unet, 10))
    left_out = set(tiny_unet.state_dict()) - set(skeleton.sources.values())
    assert left_out == {name for name in tiny_unet.state_dict() if "time_emb" in name}
    assert all(name == f"network.{source}" for name, source in skeleton.sources.items())


@torch.no_grad()
def test_features_that_the_caller_brings_stand_for_those_of_the_path(network: torch.nn.Module) -> None:
    sample, text = inputs(network_config(network))
    hot = hot_denoiser(network, TABLE).eval()
    features = hot.time(ROWS, text.added_cond)
    given = given_features(hot)
    found = given(sample, torch.zeros_like(ROWS), text.states, features)
    assert torch.equal(found, hot(sample, ROWS, text.states, text.added_cond))


def test_slices_of_the_features_stand_side_by_side(network: torch.nn.Module) -> None:
    paths = [consumer.path for consumer in kind_of(network).consumers(network)]
    hot = hot_denoiser(network, TABLE)
    slices = time_slices(hot)
    assert list(slices) == paths
    assert [start for start, _ in slices.values()] == [0, *(stop for _, stop in slices.values())][:-1]
    added = torch.zeros(2, hot.added_width)
    assert hot.time(torch.tensor([0, 1001]), added).shape == (2, max(stop for _, stop in slices.values()))


@torch.no_grad()
def test_another_table_of_the_same_shape_takes_the_place_of_the_first(tiny_unet: UNet2DConditionModel) -> None:
    table = time_table_of(tiny_unet, 10)
    hot = hot_denoiser(tiny_unet, table)
    before = hot.time(torch.tensor([3]))
    set_time_table(hot, TimeTable(table.projections[::-1].copy(), table.slices))
    assert torch.equal(hot.time(torch.tensor([6])), before)


@torch.no_grad()
def test_a_new_denoiser_takes_the_weights_of_a_stored_one(network: torch.nn.Module) -> None:
    config = network_config(network)
    stored = hot_denoiser(network, TABLE).eval()
    fresh = new_hot_denoiser(config, TABLE).eval()
    fresh.load_state_dict(stored.state_dict())
    sample, text = inputs(config, 2)
    rows = torch.tensor([3, 1002])
    drawn = [hot(sample, rows, text.states, text.added_cond) for hot in (fresh, stored)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3"])
def test_the_denoiser_of_a_pipeline_has_the_rows_of_its_own_scheduler(name: str) -> None:
    pipe = load_pipeline(sibling(name))
    hot = hot_denoiser_of(pipe, 6)
    assert hot.config["_class_name"] == type(hot.network).__name__
    assert (hot.added_width > 0) == (name != "sd2")
    if hot.added_width:
        fractional = timestep_table_of(pipe.scheduler, 6, fractional=True)
        assert hot.time.timesteps.tolist() == pytest.approx(fractional.timesteps.tolist())
    else:
        assert hot.time.table.shape[0] == 1000
