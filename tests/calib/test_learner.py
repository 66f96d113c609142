from __future__ import annotations

import torch

from s2p_deploy.calib.learner import PerTimestepAdam


def test_a_row_moves_as_if_it_were_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=generator)
    table, alone = start.clone(), start[1].clone().requires_grad_()
    ours, torchs = PerTimestepAdam(table), torch.optim.Adam([alone], lr=0.01)
    for step in range(12):
        gradient = torch.randn(3, 4, generator=generator)
        present = torch.tensor([0, 1] if step % 3 == 0 else [0, 2])
        ours.step(table, gradient, present, 0.01)
        if step % 3 == 0:
            alone.grad = gradient[1]
            torchs.step()
    torch.testing.assert_close(table[1], alone.detach(), rtol=1e-5, atol=1e-6)
    assert ours.updates.tolist() == [12, 4, 8]


def test_an_absent_row_does_not_move() -> None:
    table = torch.ones(2, 1)
    adam = PerTimestepAdam(table)
    adam.step(table, torch.ones(2, 1), torch.tensor([0, 1]), 0.1)
    kept = table[1].clone()
    adam.step(table, torch.ones(2, 1), torch.tensor([0]), 0.1)
    assert torch.equal(table[1], kept)
    torch.testing.assert_close(table[0], torch.tensor([0.8]))  # Adam's steps on a constant gradient are the rate
