from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from s2p_deploy.calib.dataset import DatasetRequest, dataset_request, merge_shards, write_shards
from s2p_deploy.calib.trajectories import load_float_pipeline
from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import PromptSet
from s2p_deploy.records.files import claimed


@pytest.fixture
def request_of_two(base: BasePipeline, recipe: Recipe, prompts: PromptSet, tmp_path: Path) -> DatasetRequest:
    return dataset_request(base, recipe, prompts.first(4), tmp_path / "dataset")


def write(request: DatasetRequest, base: BasePipeline, *ranks: int) -> None:
    source = load_float_pipeline(base, 6)
    for rank in ranks:
        write_shards(replace(request, rank=rank, ranks=2), source)


def test_nothing_to_merge(request_of_two: DatasetRequest) -> None:
    with pytest.raises(InputError, match="holds no shards: run the ranks first"):
        merge_shards(request_of_two)
    assert not request_of_two.work.exists()


def test_missing_shards_are_named(request_of_two: DatasetRequest, base: BasePipeline) -> None:
    write(request_of_two, base, 0)
    with pytest.raises(InputError, match=r"lacks 1 of 2 shards \(1\): run the ranks that make them"):
        merge_shards(request_of_two)
    assert not request_of_two.out.exists()
    write(request_of_two, base, 1)
    assert merge_shards(request_of_two).manifest.content["samples"] == 12
    assert not request_of_two.work.exists()
    assert merge_shards(request_of_two).folder == request_of_two.out


def test_a_rank_at_work_is_waited_for(request_of_two: DatasetRequest, base: BasePipeline) -> None:
    write(request_of_two, base, 0, 1)
    with claimed(request_of_two.work / "rank-1-of-2"), pytest.raises(InputError, match=r"rank-1-of-2 of .* at work"):
        merge_shards(request_of_two)
    with claimed(request_of_two.work / "merge"), pytest.raises(InputError, match=r"at work on .*merge"):
        merge_shards(request_of_two)


def test_shards_of_another_request(
    request_of_two: DatasetRequest, base: BasePipeline, recipe: Recipe, prompts: PromptSet
) -> None:
    write(request_of_two, base, 0, 1)
    other = dataset_request(base, recipe, prompts.first(3), request_of_two.out)
    with pytest.raises(InputError, match="another prompts: merge it as it was started"):
        merge_shards(other)
