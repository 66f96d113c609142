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
from s2p_deploy.records import Skipped
from s2p_deploy.validation.measurements import Agreement, EndToEnd, Floor
from s2p_deploy.validation.metrics import cosine, sqnr_db

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.context import Progress
    from s2p_deploy.engines import BoundRunner, Runner
    from s2p_deploy.records import TimestepTable
    from s2p_deploy.validation.reference import ValidationLatents

_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_SLOWEST = 10.0  # times as long as in float32: a processor that only emulates a type takes hours at full size


def measure_end_to_end(
    floating: Callable[..., torch.Tensor], fake_quant: FakeQuantDenoiser, engine: Runner, latents: ValidationLatents
) -> EndToEnd:
    """Compares one call of each denoiser on every latent; ``floating`` is called as an indexed denoiser."""
    reference = outputs_of(TorchRunner(floating), latents)
    quantized = outputs_of(TorchRunner(fake_quant), latents)
    double = outputs_of(TorchRunner(copy.deepcopy(fake_quant).double(), torch.float64), latents)
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
        guidance=sqnr_db(_guidance(quantized), _guidance(found)),
    )


def whole_denoiser(
    pipe: DiffusionPipeline, timesteps: TimestepTable, dtype: torch.dtype = torch.float32
) -> Callable[..., torch.Tensor]:
    """Wraps the pipeline's own denoiser, time path included, to be called as an indexed one.

    Another ``dtype`` than float32 takes a copy of it.
    """
    network = denoiser_of(pipe)
    family, values = family_of(network), torch.from_numpy(timesteps.timesteps).float()
    if dtype != torch.float32:
        network = torch.nn.Module.to(copy.deepcopy(network), dtype)  # diffusers' own keeps some modules in float32

    def predict(
        sample: torch.Tensor, indices: torch.Tensor, text: torch.Tensor, added_cond: torch.Tensor | None = None
    ) -> torch.Tensor:
        added = sample.new_zeros(len(sample), 0) if added_cond is None else added_cond
        return family.predict(network, sample, values[indices], text, added)

    return predict


def measure_floors(
    pipe: DiffusionPipeline,
    timesteps: TimestepTable,
    latents: ValidationLatents,
    engine: BoundRunner | None,
    progress: Progress = silent,
) -> tuple[Floor, ...]:
    """Compares the floating-point denoiser in half precision, and an ``engine`` of recipe ``fp``, with it in FP32.

    One call on every latent each. A type that this processor is too slow in is skipped.
    """
    plain = TorchRunner(whole_denoiser(pipe, timesteps))
    expected = outputs_of(plain, latents)
    floors = []
    for done, (name, dtype) in enumerate(_HALVES.items(), 1):
        runner = TorchRunner(whole_denoiser(pipe, timesteps, dtype), dtype)
        floors.append(Floor(f"FP pipeline in {name}", _compared(expected, runner, latents, plain)))
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


def _compared(expected: NDArray[Any], half: Runner, latents: ValidationLatents, plain: Runner) -> Agreement | Skipped:
    few = latents.first(2)
    slower = _seconds(half, few) / _seconds(plain, few)
    if slower > _SLOWEST:
        return Skipped(f"takes this processor {slower:.0f} times as long as float32")
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
