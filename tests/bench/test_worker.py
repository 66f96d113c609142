"""What a child feeds an engine: every dynamic size by its own name, one row, the prompt's inputs the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from s2p_deploy.bench.worker import EngineWorkload, context_of, random_inputs
from s2p_deploy.context import Context
from s2p_deploy.engines.runner import ClosingRunner
from s2p_deploy.errors import InputError
from s2p_deploy.records import ShapeProfile, TensorSpec
from tests.named_engines import NamedEngines

SPECS = (
    TensorSpec("sample", "float32", ("batch", 4, "height", "width")),
    TensorSpec("timestep_index", "int64", ("batch",)),
    TensorSpec("encoder_hidden_states", "float16", ("batch", 3, 5)),
)
SIZES = {"batch": 2, "height": 8, "width": 6}


def test_sizes_go_by_name() -> None:
    found = random_inputs(SPECS, SIZES, 7, 0)
    assert {name: value.shape for name, value in found.items()} == {
        "sample": (2, 4, 8, 6),
        "timestep_index": (2,),
        "encoder_hidden_states": (2, 3, 5),
    }
    assert found["timestep_index"].tolist() == [7, 7]
    assert found["encoder_hidden_states"].dtype == np.float16


def test_only_the_prompts_inputs_stay_from_step_to_step() -> None:
    first, second = (random_inputs(SPECS, SIZES, 7, number) for number in (0, 1))
    assert np.array_equal(first["encoder_hidden_states"], second["encoder_hidden_states"])
    assert not np.array_equal(first["sample"], second["sample"])


def test_a_size_nobody_gives_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'height'"):
        random_inputs(SPECS, {"batch": 2}, 7, 0)


class HostRunner(ClosingRunner):
    """Remembers what it was given."""

    inputs = (TensorSpec("sample", "float32", ("batch", 4, 8, 6)), *SPECS[1:])

    def __init__(self) -> None:
        self.given: list[Mapping[str, Any]] = []

    def infer(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.given.append(inputs)
        return {"noise_pred": inputs["sample"]}

    def close(self) -> None:
        """Nothing is held."""


class DeviceRunner(HostRunner):
    def infer_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.infer(inputs)


def steps_of(runner: HostRunner, count: int, indices: tuple[int, ...] = (7, 9)) -> list[Mapping[str, Any]]:
    timesteps = SimpleNamespace(calibrated_indices=indices)
    engine = SimpleNamespace(profile=ShapeProfile(), timesteps=timesteps)
    workload = EngineWorkload(engine, runner, 3, None, Context(device="cpu"))  # type: ignore[arg-type] # what it reads
    for number in range(count):
        workload.step(number)
    return runner.given


def test_an_engine_on_the_host_is_given_arrays() -> None:
    for number, given in enumerate(steps_of(HostRunner(), 3)):
        expected = random_inputs(HostRunner.inputs, {"batch": 3}, (7, 9, 7)[number], number)
        assert {name: value.tolist() for name, value in given.items()} == {
            name: value.tolist() for name, value in expected.items()
        }


@pytest.mark.parametrize("count", [3, 10, 30, 200])
def test_few_steps_are_spread_over_the_schedule(count: int) -> None:
    """A tenth of the timesteps has about a tenth of the steps, whichever tenth it is."""
    given = steps_of(HostRunner(), count, tuple(range(50)))
    tenths = [int(step["timestep_index"][0]) // 5 for step in given]
    assert max(tenths.count(tenth) for tenth in range(10)) <= count / 10 + 2


def test_an_engine_on_a_device_is_given_tensors_and_the_same_prompt() -> None:
    first, second = steps_of(DeviceRunner(), 2)
    assert (first["sample"].shape, first["timestep_index"].tolist()) == ((3, 4, 8, 6), [7, 7, 7])
    assert second["timestep_index"].tolist() == [9, 9, 9]
    assert second["encoder_hidden_states"] is first["encoder_hidden_states"], "as in a pipeline's loop"
    assert not torch.equal(first["sample"], second["sample"])


def test_networks_around_an_engine_are_on_its_device_and_on_a_gpu_in_its_type(engine_of: NamedEngines) -> None:
    on_cpu = engine_of("fp", "full")
    on_gpu = replace(on_cpu, environment=on_cpu.environment | {"device": "CUDA GPU"})
    chosen = {
        (engine.on_gpu, dtype): (context_of(one).device, context_of(one).dtype)
        for engine in (on_cpu, on_gpu)
        for dtype in ("fp32", "fp16")
        for one in [replace(engine, dtype=dtype)]
    }
    assert chosen == {
        (False, "fp32"): ("cpu", "float32"),
        (False, "fp16"): ("cpu", "float32"),
        (True, "fp32"): ("auto", "float32"),
        (True, "fp16"): ("auto", "float16"),
    }
