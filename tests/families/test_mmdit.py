from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from s2p_deploy.families import Tap, TimePath, family_of, indexed_denoiser, network_config
from s2p_deploy.records import TimestepTable
from tests.tiny_networks import POOLED, TEXT, TOKENS, tiny_mmdit

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

TIMESTEPS = np.asarray([125.5, 600.0, 1000.0])
TABLE = TimestepTable(
    "a scheduler", {}, 3, tuple(TIMESTEPS), np.linspace(0, 1, 1001), flow_matching=True, fractional=TIMESTEPS
)


def given(batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, 4, 8, 8), (batch, TOKENS, TEXT), (batch, POOLED))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def test_what_the_network_is_told(mmdit: SD3Transformer2DModel) -> None:
    kind, config = family_of(mmdit), network_config(mmdit)
    assert (kind.text_width(config), kind.added_width(config)) == (TEXT, POOLED)
    assert kind.added_cond({}) is None
    pooled = torch.ones(1, POOLED)
    assert kind.added_cond({"pooled_projections": pooled}) is pooled


@torch.no_grad()
def test_it_is_asked_as_its_pipeline_asks_it(mmdit: SD3Transformer2DModel) -> None:
    sample, states, pooled = given()
    timesteps = torch.tensor([37.5, 900.25])
    named = {"hidden_states": sample, "encoder_hidden_states": states, "pooled_projections": pooled}
    expected = mmdit(**named, timestep=timesteps).sample
    assert torch.equal(family_of(mmdit).predict(mmdit, sample, timesteps, states, pooled), expected)


@pytest.mark.parametrize("dual", [(), (0, 1)])
@torch.no_grad()
def test_every_modulation_is_a_consumer(dual: tuple[int, ...]) -> None:
    network = tiny_mmdit(dual)
    path = TimePath(network)
    norms = {f"transformer_blocks.{block}.{norm}" for block in range(3) for norm in ("norm1", "norm1_context")}
    assert set(path.slices) == norms | {"norm_out"}
    timesteps, pooled = torch.tensor([37.5]), given(1)[2]
    embedding = network.time_text_embed(timesteps, pooled)
    found = path(timesteps, pooled)
    for name, (start, stop) in path.slices.items():
        expected = network.get_submodule(name).linear(torch.nn.functional.silu(embedding))
        assert torch.allclose(found[:, start:stop], expected, atol=1e-6), name


def test_no_weight_of_a_modulation_is_left_in_the_network(mmdit: SD3Transformer2DModel) -> None:
    float_denoiser = indexed_denoiser(mmdit, TABLE)
    assert not [name for name, _ in float_denoiser.network.named_parameters() if "norm1" in name or "norm_out" in name]
    assert not [name for name, _ in float_denoiser.network.named_parameters() if "time_text_embed" in name]
    assert len(float_denoiser.time_slices()) == 7


@pytest.mark.parametrize("dual", [(), (0, 1)])
@torch.no_grad()
def test_blocks_are_joined_where_the_next_reads(dual: tuple[int, ...]) -> None:
    float_denoiser = indexed_denoiser(tiny_mmdit(dual), TABLE).eval()
    blocks = float_denoiser.family.blocks(float_denoiser.network)
    assert [block.name for block in blocks] == ["pos_embed", *(f"transformer_blocks.{i}" for i in range(3)), "output"]
    for one, other in itertools.pairwise(blocks[1:-1]):
        assert one.leaving == other.entering
    assert [len(block.leaving) for block in blocks[1:-1]] == [2, 2, 1], "the last block ends with the image alone"
    assert blocks[-1].entering == (Tap("norm_out", "input"),)


@torch.no_grad()
def test_what_leaves_a_block_is_what_the_block_gives(mmdit: SD3Transformer2DModel) -> None:
    float_denoiser = indexed_denoiser(mmdit, TABLE).eval()
    outputs: dict[str, tuple[torch.Tensor, ...]] = {}
    seen: dict[str, torch.Tensor] = {}
    blocks = float_denoiser.family.blocks(float_denoiser.network)[1:-1]
    for block in blocks:
        float_denoiser.network.get_submodule(block.name).register_forward_hook(
            lambda _, __, output, name=block.name: outputs.update({name: output})
        )
        for tap in block.leaving:
            float_denoiser.network.get_submodule(tap.module).register_forward_pre_hook(
                lambda _, args, name=tap.module: seen.update({name: args[0]})
            )
    sample, states, pooled = given()
    float_denoiser(sample, torch.tensor([0, 2]), states, pooled)
    for block in blocks:
        text, image = outputs[block.name]
        expected = (image, text)[: len(block.leaving)]
        assert all(torch.equal(seen[tap.module], value) for tap, value in zip(block.leaving, expected, strict=True))
        assert outputs[block.name][float_denoiser.family.image_output] is image
        assert image.shape == (2, 16, 16), "patches by width: the image"


def test_there_is_no_shortcut_to_split(mmdit: SD3Transformer2DModel) -> None:
    assert family_of(mmdit).split_shortcuts(mmdit) == {}
