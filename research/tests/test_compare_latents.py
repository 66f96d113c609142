from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from s2p_deploy.records import Base, LatentDataset, Manifest
from s2p_research.compare import sqnr_per_timestep

ROWS = (801, 601, 601, 1)


@pytest.fixture
def dataset(tmp_path: Path) -> LatentDataset:
    """Two prompts of four calls, two of them on one row; every answer is one text's first element, times the row."""
    rows = np.array(ROWS * 2)
    prompt = np.repeat([0, 1], len(ROWS))
    shape = (len(rows), 4, 8, 8)
    texts = np.zeros((3, 24, 128), np.float32)
    texts[:, 0, 0] = (0.5, 1.0, 2.0)  # uncond, and one for each prompt
    answers = [np.full(shape, 0.001, np.float32) * (rows * strength)[:, None, None, None] for strength in (0.5, 1.0)]
    answers[1][prompt == 1] *= 2
    return LatentDataset(
        folder=tmp_path,
        manifest=Manifest("LatentDataset", Base("none", ""), {}, {}),
        latents=np.zeros(shape, np.float16),
        timestep_indices=rows,
        prompt=prompt,
        uncond=answers[0].astype(np.float16),
        cond=answers[1].astype(np.float16),
        texts=texts,
        added_cond=np.zeros((3, 0), np.float32),
        cond_text=np.array([1, 2]),
        uncond_text=np.array([0, 0]),
    )


def exact(sample: torch.Tensor, rows: torch.Tensor, text: torch.Tensor, _added: torch.Tensor) -> torch.Tensor:
    return (0.001 * rows * text[:, 0, 0])[:, None, None, None].expand_as(sample)


def test_every_row_is_asked_with_its_own_texts(dataset: LatentDataset) -> None:
    found = sqnr_per_timestep(exact, dataset)
    assert found.timestep_indices == (1, 601, 801)
    assert min(found.db) > 60  # the stored answers' float16


def test_a_tenth_of_error_is_twenty_decibel(dataset: LatentDataset) -> None:
    found = sqnr_per_timestep(lambda *inputs: exact(*inputs) * 1.1, dataset)
    np.testing.assert_allclose(found.db, 20.0, atol=0.05)
    assert found.mean.value == pytest.approx(20.0, abs=0.05)
    assert (found.mean.n, found.mean.low) == (2, pytest.approx(20.0, abs=0.05))


def test_a_row_pools_prompts_and_branches(dataset: LatentDataset) -> None:
    """Only the unconditional branch of row 601 is wrong, by all of it: energy 2 * 0.25 of 2 * 0.25 + 1 + 4."""

    def wrong(sample: torch.Tensor, rows: torch.Tensor, text: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        spoilt = (rows == 601) & (text[:, 0, 0] == 0.5)
        return exact(sample, rows, text, added) * (~spoilt)[:, None, None, None]

    found = dict(zip((1, 601, 801), sqnr_per_timestep(wrong, dataset).db, strict=True))
    assert found[601] == pytest.approx(10 * np.log10(5.5 / 0.5), abs=0.01)
    assert min(found[1], found[801]) > 60


def test_what_is_no_number_stays_so(dataset: LatentDataset) -> None:
    found = sqnr_per_timestep(lambda *inputs: exact(*inputs) * torch.nan, dataset)
    assert np.isnan(found.db).all()
    assert np.isnan(found.mean.value)
