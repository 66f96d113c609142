from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from s2p_deploy.calib import plan_from_recipe
from s2p_deploy.calib.samples import SamplePairs, draw_samples, least_noisy, samples_at
from s2p_deploy.calib.sensitivity import layer_sensitivities
from s2p_deploy.context import Progress, silent
from s2p_deploy.errors import InputError
from s2p_deploy.families import IndexedDenoiser, discover_layers
from s2p_deploy.numerics import INT4, INT8, fake_quantize, least_squares_weight_scale
from s2p_deploy.recipe import Mixed, Recipe
from s2p_deploy.records import LatentDataset, PrecisionPlan
from s2p_deploy.timesteps import timestep_table_of

LATENTS = 4


@pytest.fixture
def plan(float_denoiser: IndexedDenoiser, recipe: Recipe) -> PrecisionPlan:
    return plan_from_recipe(recipe, discover_layers(float_denoiser))


Score = Callable[..., dict[str, float]]


@pytest.fixture
def score(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, pipe: StableDiffusionPipeline, dataset: LatentDataset
) -> Score:
    def scores(
        reading: str,
        seed: int = 3,
        latents: int = LATENTS,
        samples_per_call: int | None = None,
        progress: Progress = silent,
    ) -> dict[str, float]:
        mixed = Mixed(sensitivity=reading, latents=latents)
        table = timestep_table_of(pipe.scheduler, 6, fractional=False)
        return layer_sensitivities(
            float_denoiser,
            plan,
            table,
            dataset,
            mixed,
            seed=seed,
            progress=progress,
            samples_per_call=samples_per_call,
        )

    return scores


def products(float_denoiser: IndexedDenoiser, layer: str, losses: torch.Tensor) -> list[float]:
    """g_m^T W of every sample's loss, through the gradient of the weight itself."""
    weight = float_denoiser.network.get_submodule(layer).weight
    gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses]
    return [float((gradient * weight.detach()).sum()) for gradient in gradients]


def asked(float_denoiser: IndexedDenoiser, points: SamplePairs) -> torch.Tensor:
    return float_denoiser(*points.inputs(torch.arange(len(points.sample))))


LAYERS = (
    "conv_in",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "up_blocks.1.resnets.0.conv1",
    "conv_out",
)


def test_a_fraction_of_what_fits_into_a_forward_pass_is_scored_at_a_time(score: Score) -> None:
    """The scores are those of any other batch; the backward pass keeps what a forward pass drops."""
    told: list[tuple[str, int, int]] = []
    found = score("fisher", samples_per_call=33, progress=lambda *where: told.append(where))
    assert [done for _, done, _ in told] == list(range(2, 2 * LATENTS + 1, 2))
    whole = score("fisher")
    for name, value in found.items():
        assert value == pytest.approx(whole[name], rel=1e-3)


def test_probe_is_the_mean_square_of_every_samples_own_product(
    float_denoiser: IndexedDenoiser, dataset: LatentDataset, score: Score
) -> None:
    found = score("fisher")
    points = draw_samples(dataset, LATENTS, 3)
    assert len(points.sample) == 2 * LATENTS
    directions = torch.randn(points.sample.shape, generator=torch.Generator().manual_seed(3))
    losses = (asked(float_denoiser, points) * directions).sum((1, 2, 3))
    for layer in LAYERS:
        assert found[layer] == pytest.approx(
            np.mean(np.square(products(float_denoiser, layer, losses))) / 2, rel=1e-3
        ), layer


def test_quantized_is_the_printed_formula_of_the_output_loss(
    float_denoiser: IndexedDenoiser, dataset: LatentDataset, score: Score
) -> None:
    before = {name: value.clone() for name, value in float_denoiser.state_dict().items()}
    found = score("quantized")
    assert all(torch.equal(value, before[name]) for name, value in float_denoiser.state_dict().items()), (
        "left as it was"
    )
    points = draw_samples(dataset, LATENTS, 3)
    quantized = copy.deepcopy(float_denoiser)
    with torch.no_grad():
        for name, module in quantized.network.named_modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                fmt, weight = INT8 if name == "conv_in" else INT4, module.weight
                weight.copy_(fake_quantize(weight, least_squares_weight_scale(weight, fmt), fmt))
    losses = (asked(quantized, points) - points.output).square().mean((1, 2, 3))
    for layer in LAYERS:
        a = np.mean(products(quantized, layer, losses))
        assert found[layer] == pytest.approx(abs(a - a * a / 2), rel=2e-3), layer


def test_literal_is_the_printed_formula_of_the_diffusion_loss(
    float_denoiser: IndexedDenoiser,
    pipe: StableDiffusionPipeline,
    dataset: LatentDataset,
    score: Score,
) -> None:
    found = score("literal")
    generator = torch.Generator().manual_seed(3)
    sources = least_noisy(dataset)
    assert [int(dataset.timestep_indices[i]) for i in sources] == [
        int(dataset.timestep_indices[dataset.prompt == p].min()) for p in range(6)
    ]
    chosen = torch.randint(6, (LATENTS,), generator=generator)
    points = samples_at(dataset, sources[chosen.numpy()])
    alphas = pipe.scheduler.alphas_cumprod
    uncond, cond = points.output[:LATENTS], points.output[LATENTS:]
    kept = alphas[points.timestep_index[:LATENTS]].view(-1, 1, 1, 1)
    clean = (points.sample[:LATENTS] - (1 - kept).sqrt() * (uncond + 2.5 * (cond - uncond))) / kept.sqrt()
    row = torch.randint(1000, (LATENTS,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    noised = pipe.scheduler.add_noise(clean, noise, row)
    output = float_denoiser(torch.cat([noised, noised]), torch.cat([row, row]), points.texts[points.text].float())
    losses = (output - torch.cat([noise, noise])).square().mean((1, 2, 3))
    for layer in LAYERS:
        a = np.mean(products(float_denoiser, layer, losses))
        assert found[layer] == pytest.approx(abs(a - a * a / 2), rel=2e-3), layer


@pytest.mark.parametrize("reading", ["fisher", "literal", "quantized"])
def test_every_layer_has_a_score_and_the_seed_alone_decides_it(score: Score, plan: PrecisionPlan, reading: str) -> None:
    first = score(reading)
    assert list(first) == [layer.name for layer in plan.layers]
    assert all(value > 0 for value in first.values())
    assert score(reading) == first
    assert score(reading, seed=4) != first


def test_scaling_the_query_is_scaling_the_key(score: Score) -> None:
    found = score("fisher")
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert found[f"{block}.to_q"] == pytest.approx(found[f"{block}.to_k"], rel=1e-3)


def test_more_latents_than_stored_are_all_of_them(score: Score, dataset: LatentDataset) -> None:
    assert score("fisher", latents=10_000) == score("fisher", latents=len(dataset.timestep_indices))


def test_no_hook_stays_behind(float_denoiser: IndexedDenoiser, score: Score) -> None:
    score("fisher")
    assert not any(module._forward_hooks for module in float_denoiser.modules())
    assert all(parameter.grad is None for parameter in float_denoiser.parameters())


def test_a_broken_weight_is_named(float_denoiser: IndexedDenoiser, score: Score) -> None:
    float_denoiser.network.conv_out.weight.data[0] = float("nan")
    with pytest.raises(InputError, match="is not finite"):
        score("fisher")


def test_no_reading_is_no_score(score: Score) -> None:
    with pytest.raises(InputError, match=r"mixed\.sensitivity is none"):
        score("none")
