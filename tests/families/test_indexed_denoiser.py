from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from s2p_deploy.families import (
    Config,
    EncodedText,
    family_of,
    family_of_config,
    indexed_denoiser,
    indexed_denoiser_of,
    indexed_skeleton,
    load_pipeline,
    network_config,
    new_indexed_denoiser,
    time_table_of,
)
from s2p_deploy.records import TimestepTable, TimeTable
from s2p_deploy.timesteps import timestep_table_of
from tests.small_pipelines import sibling
from tests.tiny_networks import TOKENS

FRACTIONAL = np.asarray([8.9285717, 503.25, 900.359])
TABLE = TimestepTable("a scheduler", {}, 3, tuple(FRACTIONAL), np.linspace(0, 1, 1000), fractional=FRACTIONAL)
INDICES = torch.tensor([0, 1001, 421, 1002])  # samples of one batch differ; two have fractional timesteps


def inputs(config: Config, batch: int = len(INDICES)) -> tuple[torch.Tensor, EncodedText]:
    """Samples, and for each a text and ``added_cond`` of its own."""
    kind = family_of_config(config)
    generator = torch.Generator().manual_seed(1)
    shapes = (
        (batch, config["in_channels"], 8, 8),
        (batch, TOKENS, kind.text_width(config)),
        (batch, kind.added_width(config)),
    )
    sample, states, added = (torch.randn(shape, generator=generator) for shape in shapes)
    return sample, EncodedText(states, added.abs() * 8)


@torch.no_grad()
def test_the_table_predicts_what_the_time_path_predicted(tiny_unet: UNet2DConditionModel) -> None:
    table = time_table_of(tiny_unet, 1000)
    sample, text = inputs(network_config(tiny_unet), 3)
    indices = torch.tensor([0, 999, 421])
    expected = tiny_unet(sample, indices, text.states).sample
    float_denoiser = indexed_denoiser(copy.deepcopy(tiny_unet), table)
    assert torch.allclose(float_denoiser(sample, indices, text.states), expected, atol=1e-5)
    assert not torch.allclose(float_denoiser(sample, indices.flip(0), text.states), expected, atol=1e-3), (
        "the timestep matters"
    )


@torch.no_grad()
def test_a_table_of_timesteps_predicts_exactly_what_the_whole_network_predicts(network: torch.nn.Module) -> None:
    sample, text = inputs(network_config(network))
    timesteps = torch.from_numpy(TABLE.timesteps).float()[INDICES]
    expected = family_of(network).predict(network, sample, timesteps, text.states, text.added_cond)
    float_denoiser = indexed_denoiser(copy.deepcopy(network), TABLE).eval()
    assert torch.equal(float_denoiser(sample, INDICES, text.states, text.added_cond), expected)
    assert not torch.allclose(
        float_denoiser(sample, INDICES.flip(0), text.states, text.added_cond), expected, atol=1e-3
    )


@pytest.mark.parametrize("name", ["sdxl_unet", "mmdit"])
@torch.no_grad()
def test_every_sample_has_the_features_of_its_own_added_cond(request: pytest.FixtureRequest, name: str) -> None:
    network = request.getfixturevalue(name)
    sample, text = inputs(network_config(network))
    float_denoiser = indexed_denoiser(network, TABLE).eval()
    whole = float_denoiser(sample, INDICES, text.states, text.added_cond)
    alone = float_denoiser(sample[1:2], INDICES[1:2], text.states[1:2], text.added_cond[1:2])
    assert torch.allclose(whole[1:2], alone, atol=1e-5)
    swapped = float_denoiser(sample, INDICES, text.states, text.added_cond.flip(0))
    assert ((swapped - whole).flatten(1).abs().amax(1) > 1e-3).all()


def test_the_weights_of_the_time_path_are_gone(tiny_unet: UNet2DConditionModel) -> None:
    before = sum(parameter.numel() for parameter in tiny_unet.parameters())
    time_path = sum(p.numel() for name, p in tiny_unet.named_parameters() if "time_emb" in name)
    float_denoiser = indexed_denoiser(tiny_unet, time_table_of(tiny_unet, 10))
    assert sum(parameter.numel() for parameter in float_denoiser.parameters()) == before - time_path
    assert not any("time" in name for name, _ in float_denoiser.named_parameters())
    assert not any("table" in name for name in float_denoiser.state_dict())


def test_a_time_path_beside_the_network_is_not_trained(network: torch.nn.Module) -> None:
    before = sum(parameter.numel() for parameter in network.parameters())
    float_denoiser = indexed_denoiser(network, TABLE)
    assert sum(parameter.numel() for parameter in float_denoiser.parameters()) == before
    moved = {name for name, parameter in float_denoiser.named_parameters() if not parameter.requires_grad}
    assert moved == {name for name, _ in float_denoiser.named_parameters() if name.startswith("time.path.")} != set()
    assert not any("timesteps" in name for name in float_denoiser.state_dict())


def test_a_skeleton_accounts_for_every_tensor_of_the_checkpoint(network: torch.nn.Module) -> None:
    skeleton = indexed_skeleton(network_config(network), TABLE)
    checkpoint = network.state_dict()
    assert {tensor.device.type for tensor in skeleton.denoiser.state_dict().values()} == {"meta"}
    state = indexed_denoiser(copy.deepcopy(network), TABLE).state_dict()
    assert set(skeleton.sources) == set(state)
    assert sorted(skeleton.sources.values()) == sorted(checkpoint), "each is taken once"
    assert all(torch.equal(state[name], checkpoint[source]) for name, source in skeleton.sources.items())


def test_a_skeleton_with_a_table_leaves_the_time_path_out(tiny_unet: UNet2DConditionModel) -> None:
    skeleton = indexed_skeleton(network_config(tiny_unet), time_table_of(tiny_unet, 10))
    left_out = set(tiny_unet.state_dict()) - set(skeleton.sources.values())
    assert left_out == {name for name in tiny_unet.state_dict() if "time_emb" in name}
    assert all(name == f"network.{source}" for name, source in skeleton.sources.items())


@torch.no_grad()
def test_features_that_the_caller_passes_replace_those_of_the_path(network: torch.nn.Module) -> None:
    sample, text = inputs(network_config(network))
    float_denoiser = indexed_denoiser(network, TABLE).eval()
    features = float_denoiser.time(INDICES, text.added_cond)
    given = float_denoiser.with_given_features()
    found = given(sample, torch.zeros_like(INDICES), text.states, features)
    assert torch.equal(found, float_denoiser(sample, INDICES, text.states, text.added_cond))


def test_slices_of_the_features_stand_side_by_side(network: torch.nn.Module) -> None:
    paths = [consumer.path for consumer in family_of(network).consumers(network)]
    float_denoiser = indexed_denoiser(network, TABLE)
    slices = float_denoiser.time_slices()
    assert list(slices) == paths
    assert [start for start, _ in slices.values()] == [0, *(stop for _, stop in slices.values())][:-1]
    added = torch.zeros(2, float_denoiser.added_width)
    assert float_denoiser.time(torch.tensor([0, 1001]), added).shape == (2, max(stop for _, stop in slices.values()))


@torch.no_grad()
def test_another_table_of_the_same_shape_takes_the_place_of_the_first(tiny_unet: UNet2DConditionModel) -> None:
    table = time_table_of(tiny_unet, 10)
    float_denoiser = indexed_denoiser(tiny_unet, table)
    before = float_denoiser.time(torch.tensor([3]))
    float_denoiser.set_time_table(TimeTable(table.projections[::-1].copy(), table.slices))
    assert torch.equal(float_denoiser.time(torch.tensor([6])), before)


@torch.no_grad()
def test_a_new_denoiser_takes_the_weights_of_a_stored_one(network: torch.nn.Module) -> None:
    config = network_config(network)
    stored = indexed_denoiser(network, TABLE).eval()
    fresh = new_indexed_denoiser(config, TABLE).eval()
    fresh.load_state_dict(stored.state_dict())
    sample, text = inputs(config, 2)
    indices = torch.tensor([3, 1002])
    predicted = [float_denoiser(sample, indices, text.states, text.added_cond) for float_denoiser in (fresh, stored)]
    assert torch.equal(*predicted)


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3"])
def test_the_denoiser_of_a_pipeline_has_the_timesteps_of_its_own_scheduler(name: str) -> None:
    pipe = load_pipeline(sibling(name))
    float_denoiser = indexed_denoiser_of(pipe, 6)
    assert float_denoiser.config["_class_name"] == type(float_denoiser.network).__name__
    assert (float_denoiser.added_width > 0) == (name != "sd2")
    if float_denoiser.added_width:
        fractional = timestep_table_of(pipe.scheduler, 6, fractional=True)
        assert float_denoiser.time.timesteps.tolist() == pytest.approx(fractional.timesteps.tolist())
    else:
        assert float_denoiser.time.table.shape[0] == 1000
