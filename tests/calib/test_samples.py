from __future__ import annotations

import numpy as np
import torch

from s2p_deploy.calib.samples import BatchOrder, calibrated_indices, take_batch, take_paired_batch
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import LatentDataset


def test_a_batch_is_its_iterations_alone(dataset: LatentDataset, recipe: Recipe) -> None:
    rows = torch.tensor(calibrated_indices(dataset))
    training = recipe.training.model_copy(update={"batch": 256, "empty_prompt_share": 0.25})
    order = BatchOrder(dataset, rows, training)
    batch, again, other = (order.draw(iteration) for iteration in (7, 7, 8))
    assert torch.equal(batch.sample, again.sample)
    assert not torch.equal(batch.sample, other.sample)
    assert torch.equal(rows[batch.position], batch.timestep_index)
    assert set(batch.position.tolist()) == set(range(len(rows)))
    empty = torch.from_numpy(dataset.texts[dataset.uncond_text[0]]).float()
    share = (batch.texts == empty).flatten(1).all(1).double().mean()
    assert 0.15 < float(share) < 0.35


def test_accumulated_batches_all_differ(dataset: LatentDataset, recipe: Recipe) -> None:
    rows = torch.tensor(calibrated_indices(dataset))
    training = recipe.training.model_copy(update={"batch": 16, "accumulate": 2})
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    drawn = {tuple(BatchOrder(dataset, rows, training).draw(*place).sample.flatten().tolist()) for place in places}
    assert len(drawn) == 4


def test_a_sample_meets_its_own_branchs_answer(dataset: LatentDataset) -> None:
    rows = torch.tensor(calibrated_indices(dataset))
    batch = take_batch(dataset, rows, np.array([4, 4]), np.array([True, False]))
    assert torch.equal(batch.target[0], torch.from_numpy(dataset.uncond[4]).float())
    assert torch.equal(batch.target[1], torch.from_numpy(dataset.cond[4]).float())
    assert torch.equal(batch.texts[1], torch.from_numpy(dataset.texts[dataset.cond_text[dataset.prompt[4]]]).float())
    assert batch.timestep_index.tolist() == [dataset.timestep_indices[4]] * 2


def test_pairs_are_the_text_branches_and_then_the_empty_ones(dataset: LatentDataset) -> None:
    rows = torch.tensor(calibrated_indices(dataset))
    batch = take_paired_batch(dataset, rows, np.array([3, 5]))
    answers = np.concatenate([dataset.cond[[3, 5]], dataset.uncond[[3, 5]]])
    assert torch.equal(batch.target, torch.from_numpy(answers).float())
    assert torch.equal(batch.sample[:2], batch.sample[2:])
    assert torch.equal(batch.timestep_index[:2], batch.timestep_index[2:])
