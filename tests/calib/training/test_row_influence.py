from __future__ import annotations

import pytest
import torch
from torch import Tensor

from s2p_deploy.calib.dataset.sampler_walk import SamplerInputs, SamplerWalk, sampler_inputs
from s2p_deploy.calib.training.row_influence import row_influence
from s2p_deploy.calib.training.state import TrainingState
from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline, HotDenoiser, load_pipeline
from s2p_deploy.progress import silent
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import PromptSet


@pytest.fixture
def inputs(base: BasePipeline, hot: HotDenoiser, prompts: PromptSet, recipe: Recipe) -> SamplerInputs:
    return sampler_inputs(load_pipeline(base), hot, prompts.first(2), recipe)


@torch.no_grad()
def test_each_row_alone_is_quantized(hot: HotDenoiser, state: TrainingState, inputs: SamplerInputs) -> None:
    found = row_influence(hot, state, inputs, silent)
    assert found.shape == state.rows.shape
    walk = SamplerWalk(inputs)
    final = walk.copy().finish(hot)
    row, errors = int(state.rows[-2]), []  # PNDM calls it twice

    def mixed(sample: Tensor, rows: Tensor, texts: Tensor, added_cond: Tensor) -> Tensor:
        reference: Tensor = hot(sample, rows, texts, added_cond)
        if int(rows[0]) != row:
            return reference
        answer = state.answer(sample, rows, texts, added_cond)
        errors.append((answer - reference).square().mean())
        return answer

    moved = (walk.finish(mixed) - final).square().mean()
    assert len(errors) == 2
    torch.testing.assert_close(found[-2], moved / torch.stack(errors).mean())


def test_a_row_that_is_never_called_is_named(hot: HotDenoiser, state: TrainingState, inputs: SamplerInputs) -> None:
    state.rows[0] = 7
    with pytest.raises(InputError, match="the sampler makes no call on row 7"):
        row_influence(hot, state, inputs, silent)
