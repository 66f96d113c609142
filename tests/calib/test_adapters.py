from __future__ import annotations

import copy

import pytest
import torch

from s2p_deploy.calib.adapters import adapter_rates, attach_adapters, merge_adapters
from s2p_deploy.calib.training_state import TrainingState

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def inputs(state: TrainingState) -> Inputs:
    generator = torch.Generator().manual_seed(4)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    return sample, state.calibrated[:2], torch.randn(2, 5, 128, generator=generator), torch.zeros(2, 0)


def answer(state: TrainingState, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return state.predict(*inputs)


def test_an_update_starts_at_nothing_and_merges_into_the_weight(state: TrainingState, inputs: Inputs) -> None:
    before, names = answer(state, inputs), set(state.modules().state_dict())
    attach_adapters(state, 2, seed=0)
    assert torch.equal(answer(state, inputs), before)
    with torch.no_grad():
        for group, _ in adapter_rates(state):
            group[1].fill_(0.02)
    trained = answer(state, inputs)
    assert not torch.allclose(trained, before, rtol=1e-2)
    merge_adapters(state)
    assert torch.equal(answer(state, inputs), trained)
    assert set(state.modules().state_dict()) == names


def test_updates_and_scales_are_all_that_is_trained(state: TrainingState) -> None:
    attach_adapters(state, 2, seed=0)
    ends = {name.rpartition(".")[2] for name, p in state.denoiser.inner.named_parameters() if p.requires_grad}
    assert ends == {"log_scale", "up", "down"}


def test_the_rank_is_that_of_the_update(state: TrainingState) -> None:
    attach_adapters(state, 3, seed=0)
    down, up = adapter_rates(state)[0][0]
    assert (down.shape, up.shape) == ((3, 4 * 9), (8, 3))  # conv_in


def test_a_layers_rate_follows_its_step_size(state: TrainingState) -> None:
    attach_adapters(state, 1, seed=0)
    factors = torch.tensor([factor for _, factor in adapter_rates(state)])
    sizes = torch.stack([scale.mean() for scale in state.denoiser.weight_scales().values()])
    torch.testing.assert_close(factors, sizes / sizes.mean())


def test_the_same_seed_gives_the_same_start(state: TrainingState) -> None:
    def first(seed: int) -> torch.Tensor:
        copied = copy.deepcopy(state)
        attach_adapters(copied, 1, seed)
        return adapter_rates(copied)[0][0][0].detach()

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
