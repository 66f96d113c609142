"""Floors: what half precision alone changes, where nothing is quantized. Differences below them say nothing."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.engines import TorchRunner
from s2p_deploy.engines.runner import OUTPUT
from s2p_deploy.families import denoiser_of, kind_of
from s2p_deploy.progress import silent
from s2p_deploy.validation.measurements import Agreement, Floor
from s2p_deploy.validation.metrics import cosine, sqnr_db
from s2p_deploy.validation.numbers import Skipped

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from s2p_deploy.engines import BoundRunner, Runner
    from s2p_deploy.progress import Progress
    from s2p_deploy.records import TimestepTable
    from s2p_deploy.validation.latents import ValidationLatents

_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_SLOWEST = 10.0  # times as long as in float32: a processor that only emulates a type takes hours at full size


def whole_denoiser(
    pipe: DiffusionPipeline, timesteps: TimestepTable, dtype: torch.dtype = torch.float32
) -> Callable[..., torch.Tensor]:
    """The pipeline's own denoiser, time path and all, called as a hot one; a copy of it in a type of half precision."""
    network = denoiser_of(pipe)
    kind, values = kind_of(network), torch.from_numpy(timesteps.timesteps).float()
    if dtype != torch.float32:
        network = torch.nn.Module.to(copy.deepcopy(network), dtype)  # diffusers' own keeps some modules in float32

    def answer(
        sample: torch.Tensor, rows: torch.Tensor, text: torch.Tensor, added_cond: torch.Tensor | None = None
    ) -> torch.Tensor:
        added = sample.new_zeros(len(sample), 0) if added_cond is None else added_cond
        return kind.answer(network, sample, values[rows], text, added)

    return answer


def measure_floors(
    pipe: DiffusionPipeline,
    timesteps: TimestepTable,
    latents: ValidationLatents,
    engine: BoundRunner | None,
    progress: Progress = silent,
) -> tuple[Floor, ...]:
    """The floating-point denoiser in half precision, and an ``engine`` of recipe ``fp``, against it in FP32.

    One call on every latent each. A type that this processor is too slow in is skipped.
    """
    plain = TorchRunner(whole_denoiser(pipe, timesteps))
    expected = outputs_of(plain, latents)
    found = []
    for done, (name, dtype) in enumerate(_HALVES.items(), 1):
        runner = TorchRunner(whole_denoiser(pipe, timesteps, dtype), dtype)
        found.append(Floor(f"FP pipeline in {name}", _compared(expected, runner, latents, plain)))
        progress("floors", done, len(_HALVES) + (engine is not None))
    if engine is not None:
        found.append(Floor("FP engine", agreement(expected, outputs_of(engine, latents))))
        progress("floors", len(found), len(found))
    return tuple(found)


def agreement(reference: NDArray[Any], candidate: NDArray[Any]) -> Agreement:
    """SQNR and cosine of every sample of [n, ...]."""
    return Agreement(sqnr_db(reference, candidate), cosine(reference, candidate))


def outputs_of(runner: Runner, latents: ValidationLatents) -> NDArray[Any]:
    """``noise_pred`` [n, C, H, W] of every latent."""
    return np.concatenate([runner.infer(part.inputs())[OUTPUT] for part in latents.parts()])


def _compared(expected: NDArray[Any], half: Runner, latents: ValidationLatents, plain: Runner) -> Agreement | Skipped:
    few = latents.first(2)
    slower = _seconds(half, few) / _seconds(plain, few)
    if slower > _SLOWEST:
        return Skipped(f"takes this processor {slower:.0f} times as long as float32")
    return agreement(expected, outputs_of(half, latents))


def _seconds(runner: Runner, latents: ValidationLatents) -> float:
    """Of the faster of two calls: the first prepares things."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        runner.infer(latents.inputs())
        times.append(time.perf_counter() - start)
    return min(times)
