from __future__ import annotations

import numpy as np
import torch

from s2p_deploy.calib.quantization.scale_start import calibrated_rows
from s2p_deploy.calib.training.batches import draw_batch, take, take_pairs
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import LatentDataset


def test_a_batch_is_its_iterations_alone(dataset: LatentDataset, recipe: Recipe) -> None:
    rows = torch.tensor(calibrated_rows(dataset))
    training = recipe.training.model_copy(update={"batch": 256, "empty_prompt_share": 0.25})
    batch, again, other = (draw_batch(dataset, rows, training, iteration) for iteration in (7, 7, 8))
    assert torch.equal(batch.sample, again.sample)
    assert not torch.equal(batch.sample, other.sample)
    assert torch.equal(rows[batch.index], batch.row)
    assert set(batch.index.tolist()) == set(range(len(rows)))
    empty = torch.from_numpy(dataset.texts[dataset.uncond_text[0]])
    share = (batch.texts == empty).flatten(1).all(1).double().mean()
    assert 0.15 < float(share) < 0.35


def test_accumulated_batches_all_differ(dataset: LatentDataset, recipe: Recipe) -> None:
    rows = torch.tensor(calibrated_rows(dataset))
    training = recipe.training.model_copy(update={"batch": 16, "accumulate": 2})
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    drawn = {tuple(draw_batch(dataset, rows, training, *place).sample.flatten().tolist()) for place in places}
    assert len(drawn) == 4


def test_serial_order_goes_from_noise_to_picture_and_round(dataset: LatentDataset, recipe: Recipe) -> None:
    rows = torch.tensor(calibrated_rows(dataset))
    training = recipe.training.model_copy(update={"order": "serial", "accumulate": 2})
    seen = [
        set(torch.cat([draw_batch(dataset, rows, training, iteration, part).row for part in range(2)]).tolist())
        for iteration in range(len(rows) + 1)
    ]
    assert seen == [{row} for row in [*reversed(rows.tolist()), int(rows[-1])]]


def test_a_sample_meets_its_own_branchs_answer(dataset: LatentDataset) -> None:
    rows = torch.tensor(calibrated_rows(dataset))
    batch = take(dataset, rows, np.array([4, 4]), np.array([True, False]))
    assert torch.equal(batch.target[0], torch.from_numpy(dataset.uncond[4]).float())
    assert torch.equal(batch.target[1], torch.from_numpy(dataset.cond[4]).float())
    assert torch.equal(batch.texts[1], torch.from_numpy(dataset.texts[dataset.cond_text[dataset.prompt[4]]]))
    assert batch.row.tolist() == [dataset.rows[4]] * 2


def test_pairs_are_the_text_branches_and_then_the_empty_ones(dataset: LatentDataset, recipe: Recipe) -> None:
    rows = torch.tensor(calibrated_rows(dataset))
    batch = take_pairs(dataset, rows, np.array([3, 5]))
    answers = np.concatenate([dataset.cond[[3, 5]], dataset.uncond[[3, 5]]])
    assert torch.equal(batch.target, torch.from_numpy(answers).float())
    drawn = draw_batch(dataset, rows, recipe.training.model_copy(update={"loss": "guided", "batch": 9}), 0)
    assert len(drawn.sample) == 8
    assert torch.equal(drawn.sample[:4], drawn.sample[4:])
    assert torch.equal(drawn.row[:4], drawn.row[4:])
    assert not torch.equal(drawn.target[:4], drawn.target[4:])
