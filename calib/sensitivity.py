"""How much the output depends on each layer's weights: the Fisher score of S2P (arXiv 2412.06661, section 4.3).

The paper prints S_i = |g^T W_i - 1/2 (1/n sum_m g_m^T W_i)^2|, an estimate of how a loss L changes where W_i goes to 0,
with g = dL/dW_i, and leaves L open. Three readings, by the recipe's ``mixed.sensitivity``, where the product of two
tensors is the sum over their elements, and a sample m is one latent with one of its two texts (both CFG branches):

``fisher`` (default): S_i = 1/(2n) sum_m (g_m^T W_i)^2 with g_m = d<v_m, eps_fp(x_m)>/dW_i and v_m ~ N(0, I). The mean
    of squares instead of the square of a mean is the empirical Fisher information; it needs no labels, and it does not
    vanish at the floating-point weights, where the gradient of any distance to the teacher is zero.
``literal``: the printed formula at the floating-point weights. L is the diffusion loss, the mean over elements of
    (eps_fp(x_t) - eps)^2 and over samples. x_t = alpha_t x_0 + sigma_t eps has eps ~ N(0, I) and t uniform over the
    indices (the scheduler's training timesteps, or where those have none its schedule); x_0 is the clean latent that
    the guided output at the least noisy sample of a random prompt predicts (best with all calls stored).
    v-prediction compares with alpha_t eps - sigma_t x_0, prediction of the picture with x_0, and flow matching with
    eps - x_0.
``quantized``: the printed formula at the weights on their starting (least-squares) grids, activations in floating
    point. L is L_out: the mean of (eps_q(x_m) - eps_fp(x_m))^2 over elements and samples, eps_fp as stored.

With a mean as its loss, g^T W_i is the mean a_i of g_m^T W_i, so both printed forms are |a_i - a_i^2 / 2|.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from s2p_deploy.calib.samples import draw_samples, least_noisy, samples_at
from s2p_deploy.errors import InputError
from s2p_deploy.numerics import fake_quantize, format_by_name, least_squares_weight_scale
from s2p_deploy.timesteps import angles_of_timesteps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from s2p_deploy.calib.samples import SamplePairs
    from s2p_deploy.context import Progress
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.recipe import Mixed
    from s2p_deploy.records import LatentDataset, PrecisionPlan, TimestepTable

# A backward pass needs all activations: 2 GiB a sample of SD v1-4, where a forward pass takes 0.13 at once.
_KEPT = 16


@dataclass(frozen=True)
class _SampleLoss:
    """A loss of each sample, and the score that follows from its products with the weights.

    ``of`` gives [b] from outputs and ``target``, both float32 [b, C, H, W]; ``score`` gives [layers] from the products
    [n, layers]. ``weights`` float32 replace parameters of the denoiser, by name.
    """

    pairs: SamplePairs
    target: Tensor
    weights: Mapping[str, Tensor]
    of: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor], Tensor]


def layer_sensitivities(  # noqa: PLR0913 - which scores, of what, from which samples
    denoiser: IndexedDenoiser,
    plan: PrecisionPlan,
    timesteps: TimestepTable,
    dataset: LatentDataset,
    mixed: Mixed,
    *,
    seed: int,
    progress: Progress,
    samples_per_call: int | None = None,
) -> dict[str, float]:
    """Scores every layer of the plan, not negative, by ``mixed.sensitivity`` over ``mixed.latents`` samples.

    Args:
        denoiser: the floating-point denoiser, left as it was.
        plan: its layers, and the weight formats for ``quantized``.
        timesteps: noise levels and kind of prediction, for ``literal``.
        dataset: samples to score with.
        mixed: the reading, and how many samples.
        seed: of all draws.
        progress: called after every batch.
        samples_per_call: as many as fit into a forward pass (None: a few); a fraction of them is scored at a time.

    Raises:
        InputError: the recipe asks for no sensitivity, or a score is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = draw_samples(dataset, mixed.latents, seed)
    if mixed.sensitivity == "fisher":
        directions = torch.randn(pairs.output.shape, generator=generator)
        loss = _SampleLoss(pairs, directions, {}, _projected, _mean_of_squares)
    elif mixed.sensitivity == "literal":
        loss = _diffusion_loss(dataset, timesteps, len(pairs.sample) // (2 if dataset.guided else 1), generator)
    elif mixed.sensitivity == "quantized":
        loss = _SampleLoss(pairs, pairs.output, _weights_on_grids(denoiser, plan), _squared_error, _as_printed)
    else:
        raise InputError("mixed.sensitivity is none: choose fisher, literal or quantized")
    names = [layer.name for layer in plan.layers]
    samples = None if samples_per_call is None else max(1, samples_per_call // _KEPT)
    scores = loss.score(_products(denoiser, names, loss, progress, samples)).tolist()
    bad = [name for name, score in zip(names, scores, strict=True) if not 0 <= score < float("inf")]
    if bad:
        raise InputError(
            f"the sensitivity of {bad[0]} is not finite, though every weight is: the scheduler does not suit it"
        )
    return dict(zip(names, scores, strict=True))


def _projected(output: Tensor, direction: Tensor) -> Tensor:
    return (output * direction).flatten(1).sum(1)


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).mean(1)


def _mean_of_squares(products: Tensor) -> Tensor:
    return products.square().mean(0) / 2


def _as_printed(products: Tensor) -> Tensor:
    mean = products.mean(0)
    return (mean - mean.square() / 2).abs()


def _products(
    denoiser: IndexedDenoiser, names: list[str], loss: _SampleLoss, progress: Progress, samples: int | None
) -> Tensor:
    """Computes g_m^T W_i of every sample and layer, float64 [n, layers]."""
    pairs, device, products = loss.pairs, denoiser.device, []
    for which in pairs.batches(samples):
        inputs = tuple(argument.to(device) for argument in pairs.inputs(which))
        with torch.enable_grad(), _weight_factors(denoiser, names) as factors:
            output = torch.func.functional_call(denoiser, dict(loss.weights), inputs)
            total = loss.of(output, loss.target[which].to(device)).sum()
            gradients = torch.autograd.grad(total, [factors[name] for name in names])
        products.append(torch.stack([gradient.flatten() for gradient in gradients], 1).cpu().double())
        progress("sensitivity", int(which[-1]) + 1, len(pairs.sample))
    return torch.cat(products)


@contextmanager
def _weight_factors(denoiser: IndexedDenoiser, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Multiplies every layer's weight by a factor of 1 per sample: its gradient is the sample's own g_m^T W_i.

    Gives the factors [b, 1, ...] of the latest forward pass, by layer. No gradient of a weight is ever stored, and the
    output stays what it was, bit for bit.
    """
    factors: dict[str, Tensor] = {}

    def watch(name: str) -> RemovableHandle:
        def multiply(module: nn.Conv2d | nn.Linear, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            factor = output.new_ones(len(output), *(1,) * (output.dim() - 1)).requires_grad_()
            factors[name] = factor
            bias = module.bias
            if bias is None:
                return output * factor
            shift = bias.detach().view(-1, 1, 1) if isinstance(module, nn.Conv2d) else bias.detach()
            return output * factor + shift * (1 - factor)

        handle: RemovableHandle = denoiser.network.get_submodule(name).register_forward_hook(multiply)
        return handle

    hooks = [watch(name) for name in names]
    try:
        yield factors
    finally:
        for hook in hooks:
            hook.remove()


def _weights_on_grids(denoiser: IndexedDenoiser, plan: PrecisionPlan) -> dict[str, Tensor]:
    """Quantizes the weights that the plan quantizes on their least-squares grids; returns them by parameter name."""
    quantized = {}
    for layer in plan.layers:
        fmt = format_by_name(layer.weights)
        if fmt is not None:
            weight = denoiser.network.get_submodule(layer.name).weight.detach()
            quantized[f"network.{layer.name}.weight"] = fake_quantize(
                weight, least_squares_weight_scale(weight, fmt), fmt
            )
    return quantized


def _diffusion_loss(
    dataset: LatentDataset, timesteps: TimestepTable, count: int, generator: torch.Generator
) -> _SampleLoss:
    """Makes the diffusion loss on ``count`` clean latents, each under both texts of its prompt, or its one."""
    sources = least_noisy(dataset)
    chosen = torch.randint(len(sources), (count,), generator=generator).numpy()
    pairs = samples_at(dataset, sources[chosen])
    guidance = float(dataset.manifest.content["sampling"]["guidance_scale"])
    kind = "flow" if timesteps.flow_matching else timesteps.scheduler_config["prediction_type"]
    uncond, cond = pairs.output[:count], pairs.output[-count:]  # the same without guidance
    guided = uncond + guidance * (cond - uncond)
    latents, mask = pairs.sample[:count].split_with_sizes((guided.shape[1], pairs.sample.shape[1] - guided.shape[1]), 1)
    clean = _clean(kind, latents, guided, *_levels(timesteps, pairs.timestep_index[:count]))
    index = torch.randint(len(timesteps), (count,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    alpha, sigma = _levels(timesteps, index)
    velocity = alpha * noise - sigma * clean
    targets = {"epsilon": noise, "v_prediction": velocity, "sample": clean, "flow": noise - clean}
    branches = len(pairs.sample) // count
    sample = torch.cat([alpha * clean + sigma * noise, mask], 1)
    noised = replace(pairs, sample=sample.repeat(branches, 1, 1, 1), timestep_index=index.repeat(branches))
    return _SampleLoss(noised, targets[kind].repeat(branches, 1, 1, 1), {}, _squared_error, _as_printed)


def _levels(timesteps: TimestepTable, index: Tensor) -> tuple[Tensor, Tensor]:
    """Computes alpha and sigma float32 [n, 1, 1, 1] of timestep indices."""
    angle = torch.from_numpy(angles_of_timesteps(timesteps.timesteps[index.numpy()], timesteps)).view(-1, 1, 1, 1)
    alpha, sigma = (1 - angle, angle) if timesteps.flow_matching else (angle.cos(), angle.sin())
    return alpha.float(), sigma.float()


def _clean(kind: str, sample: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Computes the clean latents that a network's output on a noised sample predicts."""
    if kind == "epsilon":
        return (sample - sigma * output) / alpha
    if kind == "v_prediction":
        return alpha * sample - sigma * output
    if kind == "flow":
        return sample - sigma * output
    return output
