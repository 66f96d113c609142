"""A pipeline's own denoiser behind a runner's interface: what is drawn with it must not change by a bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2p_deploy.engines import TorchRunner
from s2p_deploy.families import denoiser_of, kind_of
from s2p_deploy.pipeline import EngineComponent, engine_denoiser
from s2p_deploy.records import TimestepTable
from s2p_deploy.timesteps import timestep_table_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TABLE = TimestepTable("PNDMScheduler", {}, 50, (1, 501, 940), np.linspace(0.1, 1.5, 1000))


def whole_denoiser(pipe: DiffusionPipeline, steps: int) -> EngineComponent:
    """The pipeline's own denoiser behind the runner's interface, on the rows of its scheduler."""
    network = denoiser_of(pipe)
    table = timestep_table_of(pipe.scheduler, steps, fractional=True)
    kind, timesteps = kind_of(network), torch.from_numpy(table.timesteps).float()

    def answer(
        sample: torch.Tensor, rows: torch.Tensor, text: torch.Tensor, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        nothing = sample.new_zeros(len(sample), 0)
        return kind.answer(network, sample, timesteps[rows], text, nothing if added is None else added)

    return engine_denoiser(TorchRunner(answer), network.config, table)
