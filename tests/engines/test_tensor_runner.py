"""A bound engine that takes tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from s2p_deploy.engines.conditioning import PromptFeatures, StoredFeatures
from s2p_deploy.engines.runner import (
    BoundRunner,
    BoundTensorRunner,
    ClosingRunner,
    TensorRunner,
    UniformTimestepRunner,
    UniformTimestepTensorRunner,
)
from s2p_deploy.errors import InputError
from s2p_deploy.records import TensorSpec, TimestepTable

INPUTS = (
    TensorSpec("sample", "float16", ("batch", 4, 8, 8)),
    TensorSpec("timestep_index", "int64", ("batch",)),
    TensorSpec("encoder_hidden_states", "float16", ("batch", 6, 48)),
)
PROJECTIONS = TensorSpec("time_projections", "float16", ("batch", 3))
ROWS = TimestepTable("DDIMScheduler", {}, 3, (1, 501, 981), np.linspace(0.03, 1.5, 1000))


class Echo(ClosingRunner):
    """Gives back what it was given."""

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"noise_pred": inputs["sample"], **inputs}

    def close(self) -> None: ...


class TensorEcho(Echo):
    """The same for tensors."""

    def infer_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"noise_pred": inputs["sample"], **inputs}


def given(rows: tuple[int, ...] = (3, 981)) -> dict[str, torch.Tensor]:
    batch = len(rows)
    return {
        "sample": torch.full((batch, 4, 8, 8), 0.1),
        "timestep_index": torch.tensor(rows),
        "encoder_hidden_states": torch.zeros(batch, 6, 48),
    }


def test_only_a_runner_that_takes_tensors_says_so() -> None:
    assert not isinstance(BoundRunner(Echo(), INPUTS, ROWS), TensorRunner)
    assert isinstance(BoundTensorRunner(TensorEcho(), INPUTS, ROWS), TensorRunner)


def test_tensors_reach_the_runner_as_they_are() -> None:
    values = given()
    found = BoundTensorRunner(TensorEcho(), INPUTS, ROWS).infer_tensors(values)
    assert all(found[name] is value for name, value in values.items())


def test_the_rows_features_are_gathered() -> None:
    table = np.random.default_rng(0).standard_normal((1000, 3)).astype(np.float16)
    runner = BoundTensorRunner(TensorEcho(), (*INPUTS, PROJECTIONS), ROWS, StoredFeatures(table))
    assert np.array_equal(runner.infer_tensors(given())["time_projections"].cpu(), table[[3, 981]])


def test_the_table_of_features_lies_where_the_samples_are() -> None:
    """A device without data stands for a second GPU."""
    table = np.zeros((1000, 3), np.float16)
    runner = BoundTensorRunner(TensorEcho(), (*INPUTS, PROJECTIONS), ROWS, StoredFeatures(table))
    for device in ("cpu", "meta", "cpu"):
        values = given() | {"sample": torch.full((2, 4, 8, 8), 0.1, device=device)}
        assert runner.infer_tensors(values)["time_projections"].device.type == device


def test_features_of_a_prompt_are_computed_on_the_way() -> None:
    def condition(timesteps: np.ndarray, added_cond: np.ndarray) -> np.ndarray:
        return (timesteps[:, None] + added_cond).astype(np.float16)

    features = PromptFeatures(condition, ROWS.timesteps, ahead=(3,), added_width=3)
    runner = BoundTensorRunner(TensorEcho(), (*INPUTS, PROJECTIONS), ROWS, features)
    added = torch.tensor([[0.5, 1, 2], [4, 8, 16]], dtype=torch.float16)
    found = runner.infer_tensors(given() | {"added_cond": added})
    assert "added_cond" not in found, "the engine does not take it"
    assert found["time_projections"].tolist() == (torch.tensor([[3.0], [981.0]]) + added).half().tolist()
    with pytest.raises(InputError, match="needs an input 'added_cond'"):
        runner.infer_tensors(given())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, 4, 16, 16)}, "sample has shape"),
        ({"timestep_index": torch.tensor([0, 1000])}, "indices are 0 to 999"),
        ({"act_scales": torch.ones(1000, 2)}, "no input 'act_scales'"),
    ],
)
def test_wrong_tensors_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BoundTensorRunner(TensorEcho(), INPUTS, ROWS).infer_tensors(given() | change)


def test_an_engine_of_one_timestep_per_batch_takes_tensors_too() -> None:
    assert not isinstance(UniformTimestepRunner(Echo()), TensorRunner)
    runner = BoundTensorRunner(UniformTimestepTensorRunner(TensorEcho()), INPUTS, ROWS)
    values = given((3, 3))
    assert runner.infer_tensors(values)["sample"] is values["sample"]
    with pytest.raises(InputError, match="batches of one timestep"):
        runner.infer_tensors(given((3, 981)))
