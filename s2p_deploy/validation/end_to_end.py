"""End to end: one call of the whole denoiser, and the floors below which differences mean nothing.

The question is whether the engine is as far from floating point as the fake-quantized model that it was made from. The
floors are what half precision alone changes where nothing is quantized.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.context import silent
from s2p_deploy.engines import TorchRunner
from s2p_deploy.engines.runner import OUTPUT
from s2p_deploy.families import denoiser_of, family_of
from s2p_deploy.metrics import CPU, cosine, sqnr_db
from s2p_deploy.records import Skipped
from s2p_deploy.validation.measurements import Agreement, EndToEnd, Floor
from s2p_deploy.validation.placement import float64_device, onloaded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from numpy.typing import NDArray

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.context import Progress
    from s2p_deploy.engines import BoundRunner, Runner
    from s2p_deploy.records import TimestepTable
    from s2p_deploy.validation.reference import ValidationLatents

_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_SLOWEST = 10.0  # times as long as in float32: a device that only emulates a type takes hours at full size


def measure_end_to_end(
    floating: WholeDenoiser,
    fake_quant: FakeQuantDenoiser,
    engine: Runner,
    latents: ValidationLatents,
    *,
    device: torch.device = CPU,
) -> EndToEnd:
    """Compares one call of each denoiser on every latent; the references compute on ``device``, one after the other.

    The fake-quantized model in float64 computes on the CPU where a GPU is slow in that (:func:`float64_device`).
    """
    reference, quantized = (outputs_on(device, network, latents) for network in (floating, fake_quant))
    exact = copy.deepcopy(fake_quant).double()
    double = outputs_on(float64_device(device), exact, latents, torch.float64)
    del exact
    found = outputs_of(engine, latents)
    to_fp = sqnr_db(reference, quantized)
    return EndToEnd(
        timestep_indices=latents.timestep_indices,
        fake_quant=to_fp,
        engine=sqnr_db(reference, found),
        engine_to_fake_quant=sqnr_db(quantized, found),
        floor=sqnr_db(double, quantized),
        floor_change=float(np.mean(to_fp - sqnr_db(reference, double))),
        cosines=np.stack([cosine(reference, quantized), cosine(reference, found)]),
        guidance=sqnr_db(_guidance(quantized), _guidance(found)) if latents.guided else np.zeros(0),
    )


class WholeDenoiser(torch.nn.Module):
    """A pipeline's own denoiser, time path included, called as an indexed one: with indices of ``timesteps``."""

    timesteps: torch.Tensor

    def __init__(self, network: ModelMixin, timesteps: TimestepTable) -> None:
        super().__init__()
        self.network, self._family = network, family_of(network)
        values = torch.from_numpy(timesteps.timesteps).float().to(self.device)
        self.register_buffer("timesteps", values, persistent=False)  # float32 beside a network in half precision

    @property
    def device(self) -> torch.device:
        """Returns the device of the weights."""
        device: torch.device = next(self.network.parameters()).device
        return device

    def forward(
        self, sample: torch.Tensor, indices: torch.Tensor, text: torch.Tensor, added_cond: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predicts the network's raw output [batch, C, H, W]; arguments as :meth:`IndexedDenoiser.forward`."""
        added = sample.new_zeros(len(sample), 0) if added_cond is None else added_cond
        return self._family.predict(self.network, sample, self.timesteps[indices], text, added)


def whole_denoiser(
    pipe: DiffusionPipeline, timesteps: TimestepTable, dtype: torch.dtype = torch.float32
) -> WholeDenoiser:
    """Wraps the pipeline's denoiser to be called as an indexed one. Another ``dtype`` than float32 takes a copy."""
    network = denoiser_of(pipe)
    if dtype != torch.float32:
        network = torch.nn.Module.to(copy.deepcopy(network), dtype)  # diffusers' own keeps some modules in float32
    return WholeDenoiser(network, timesteps)


def measure_floors(
    pipe: DiffusionPipeline,
    timesteps: TimestepTable,
    latents: ValidationLatents,
    engine: BoundRunner | None,
    *,
    progress: Progress = silent,
    device: torch.device = CPU,
) -> tuple[Floor, ...]:
    """Compares the floating-point denoiser in half precision, and an ``engine`` of recipe ``fp``, with it in FP32.

    One call on every latent each, on ``device``. A type that this device is too slow in is skipped.
    """
    whole = whole_denoiser(pipe, timesteps)
    expected = outputs_on(device, whole, latents)
    floors = []
    for done, (name, dtype) in enumerate(_HALVES.items(), 1):
        half = whole_denoiser(pipe, timesteps, dtype)
        with onloaded(whole, device), onloaded(half, device):
            compared = _compared(expected, TorchRunner(half, dtype), latents, TorchRunner(whole))
        floors.append(Floor(f"FP pipeline in {name}", compared))
        progress("floors", done, len(_HALVES) + (engine is not None))
    if engine is not None:
        floors.append(Floor("FP engine", agreement(expected, outputs_of(engine, latents))))
        progress("floors", len(floors), len(floors))
    return tuple(floors)


def agreement(reference: NDArray[Any], candidate: NDArray[Any]) -> Agreement:
    """Computes SQNR and cosine of every sample of [n, ...]."""
    return Agreement(sqnr_db(reference, candidate), cosine(reference, candidate))


def outputs_of(runner: Runner, latents: ValidationLatents) -> NDArray[Any]:
    """Runs all latents; returns ``noise_pred`` [n, C, H, W]."""
    return np.concatenate([runner.infer(part.inputs())[OUTPUT] for part in latents.parts()])


def outputs_on(
    device: torch.device,
    network: WholeDenoiser | FakeQuantDenoiser,
    latents: ValidationLatents,
    dtype: torch.dtype = torch.float32,
) -> NDArray[Any]:
    """Runs all latents as :func:`outputs_of`, through a network that is on ``device`` meanwhile."""
    with onloaded(network, device):
        return outputs_of(TorchRunner(network, dtype), latents)


def _compared(expected: NDArray[Any], half: Runner, latents: ValidationLatents, plain: Runner) -> Agreement | Skipped:
    few = latents.first(2)
    slower = _seconds(half, few) / _seconds(plain, few)
    if slower > _SLOWEST:
        return Skipped(f"takes this device {slower:.0f} times as long as float32")
    return agreement(expected, outputs_of(half, latents))


def _seconds(runner: Runner, latents: ValidationLatents) -> float:
    """Times two calls and takes the faster: the first prepares things."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        runner.infer(latents.inputs())
        times.append(time.perf_counter() - start)
    return min(times)


def _guidance(outputs: NDArray[Any]) -> NDArray[np.float64]:
    """Computes what the prompt adds to the empty prompt's prediction, [n / 2, ...]."""
    direction: NDArray[np.float64] = outputs[1::2].astype(np.float64) - outputs[::2]
    return direction
