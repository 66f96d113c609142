from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from s2p_deploy.errors import S2PError
from s2p_deploy.records import Base, LatentDataset, write_artifact
from s2p_deploy.records.latent_dataset import MappedRows

if TYPE_CHECKING:
    from pathlib import Path

SHARDS, POINTS = 8, 64


def shard(number: int) -> dict[str, np.ndarray]:
    latents = np.full((POINTS, 4, 32, 32), number, np.float16)
    indices = np.arange(POINTS, dtype=np.int64)
    return {
        "latents": latents,
        "timestep_indices": indices,
        "cond": latents + 1,
        "uncond": latents + 2,
        "prompt": indices,
    }


def texts() -> dict[str, np.ndarray]:
    which = np.zeros(POINTS, np.int64)
    added = np.zeros((2, 0), np.float32)
    return {"texts": np.ones((2, 3, 5), np.float16), "added_cond": added, "cond_text": which, "uncond_text": which}


def written(folder: Path, **changes: dict[str, np.ndarray]) -> Path:
    """A dataset; ``changes`` replaces the tensors of a file."""

    def fill(out: Path) -> dict[str, Any]:
        for number in range(SHARDS):
            save_file(changes.get(f"shard_{number}", shard(number)), out / f"shard-{number:05d}.safetensors")
        save_file(changes.get("texts", texts()), out / "texts.safetensors")
        return {}

    write_artifact(folder, kind="LatentDataset", base=Base("x", "1"), recipe={}, fill=fill)
    return folder


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    dataset = LatentDataset.open(written(tmp_path / "d"))
    assert dataset.latents.shape == (SHARDS * POINTS, 4, 32, 32)
    assert dataset.latents[:][:, 0, 0, 0].tolist() == [number for number in range(SHARDS) for _ in range(POINTS)]
    assert (dataset.uncond[:] - dataset.latents[:] == 2).all()
    assert dataset.added_cond.shape == (2, 0)


def test_a_dataset_stays_on_the_disk(tmp_path: Path) -> None:
    folder = written(tmp_path / "d")
    LatentDataset.open(folder)  # imports
    tracemalloc.start()
    dataset = LatentDataset.open(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = dataset.latents.nbytes + dataset.cond.nbytes + dataset.uncond.nbytes
    assert peak < size / 20


ROWS = np.arange(20, dtype=np.float16).reshape(10, 2)


@pytest.mark.parametrize("parts", [(10,), (1, 9), (4, 0, 3, 3)])
@pytest.mark.parametrize(
    "which", [3, -1, slice(2, 9, 3), [0, 9, 0], np.array([7, 1]), np.arange(10) % 3 == 0, np.array([], np.int64)]
)
def test_rows_of_several_files_are_those_of_one_array(parts: tuple[int, ...], which: slice | np.ndarray) -> None:
    rows = MappedRows(np.split(ROWS, np.cumsum(parts)[:-1]))
    assert rows.shape == ROWS.shape
    assert len(rows) == 10
    assert rows.nbytes == ROWS.nbytes
    np.testing.assert_array_equal(rows[which], ROWS[which])
    assert rows[which].dtype == np.float16
    np.testing.assert_array_equal(np.asarray(rows), ROWS)


@pytest.mark.parametrize("which", [10, -11, [3, 10]])
def test_a_row_that_is_not_there_is_refused(which: int | list[int]) -> None:
    with pytest.raises(IndexError):
        MappedRows([ROWS])[which]


def test_what_is_done_to_taken_rows_stays_out_of_the_file(tmp_path: Path) -> None:
    folder = written(tmp_path / "d")
    dataset = LatentDataset.open(folder)
    for taken in (dataset.latents[0], dataset.cond[:2], dataset.texts):
        taken[:] = 7
    assert LatentDataset.open(folder).manifest == dataset.manifest  # verified by digests


@pytest.mark.parametrize("name", ["latents", "timestep_indices", "cond", "uncond", "prompt"])
def test_a_shard_without_a_tensor_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    lacking = {key: value for key, value in shard(3).items() if key != name}
    folder = written(tmp_path / "d", shard_3=lacking)
    with pytest.raises(S2PError, match=rf"shard-00003\.safetensors lacks {name}: make the artifact again$"):
        LatentDataset.open(folder)


def test_texts_without_a_tensor_are_named(tmp_path: Path) -> None:
    lacking = {key: value for key, value in texts().items() if key != "cond_text"}
    with pytest.raises(S2PError, match=r"texts\.safetensors lacks cond_text"):
        LatentDataset.open(written(tmp_path / "d", texts=lacking))


@pytest.mark.parametrize(
    "change",
    [
        {"latents": np.zeros((POINTS, 4, 32, 31), np.float16)},
        {"latents": np.zeros((POINTS, 4, 32, 32), np.float32)},
        {"timestep_indices": np.zeros((POINTS, 1), np.int64)},
        {"prompt": np.zeros((), np.int64)},
    ],
)
def test_a_tensor_of_another_form_is_named(tmp_path: Path, change: dict[str, np.ndarray]) -> None:
    folder = written(tmp_path / "d", shard_7=shard(7) | change)
    with pytest.raises(S2PError, match=rf"shard-00007\.safetensors is damaged: {next(iter(change))} is"):
        LatentDataset.open(folder)
