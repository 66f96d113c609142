"""How far an error of each row moves the last latents, measured through the sampler and the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from s2p_deploy.calib.dataset.sampler_walk import SamplerInputs, SamplerWalk
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.calib.training.state import TrainingState
    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.progress import Progress

STAGE = "row influence"


@torch.no_grad()
def row_influence(teacher: HotDenoiser, state: TrainingState, inputs: SamplerInputs, progress: Progress) -> Tensor:
    """Squared error of the last latents over squared error of the output, float32 [calibrated rows].

    The floating-point trajectories are walked once. Then, for each row, they are walked again from its first call with
    that row alone quantized: what this does to the last latents is divided by what it did to the outputs. A row on
    which quantizing changes nothing has influence 0.

    Raises:
        InputError: a calibrated row is not among the sampler's calls.
    """
    parts = list(inputs.parts())
    moved = torch.zeros(len(state.rows), dtype=torch.float64)
    caused = torch.zeros_like(moved)
    for number, part in enumerate(parts):
        starts, final = _floating_point(teacher, part)
        for index, row in enumerate(state.rows.tolist()):
            if row not in starts:
                raise InputError(f"the sampler makes no call on row {row}, which is calibrated: set its steps")
            last, error = _quantized_at(row, starts[row].copy(), teacher, state)
            moved[index] += float((last - final).double().square().mean()) * len(final)
            caused[index] += error * len(final)
            progress(STAGE, number * len(state.rows) + index + 1, len(parts) * len(state.rows))
    return torch.where(caused > 0, moved / caused, 0.0).float()


def _floating_point(teacher: HotDenoiser, inputs: SamplerInputs) -> tuple[dict[int, SamplerWalk], Tensor]:
    """The walk as it stands before the first call on each row, and the last latents."""
    walk = SamplerWalk(inputs)
    starts: dict[int, SamplerWalk] = {}
    while not walk.finished:
        if walk.row not in starts:
            starts[walk.row] = walk.copy()
        walk.advance(walk.answer(teacher))
    return starts, walk.latents


def _quantized_at(row: int, walk: SamplerWalk, teacher: HotDenoiser, state: TrainingState) -> tuple[Tensor, float]:
    """The last latents where only calls on ``row`` are quantized, and those calls' mean squared error."""
    errors = []
    while not walk.finished:
        quantized = walk.row == row
        answer = walk.answer(teacher)
        if quantized:
            reference, answer = answer, walk.answer(state.answer)
            errors.append(float((answer - reference).double().square().mean()))
        walk.advance(answer)
    return walk.latents, sum(errors) / len(errors)
