"""Which requests begin and run next, by hand; no policy ever starves a request (Hypothesis); how a batch is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from s2p_deploy.engines.runner import ClosingRunner
from s2p_deploy.errors import InputError
from s2p_deploy.serve.batching import (
    BATCHINGS,
    BatchingPolicy,
    BatchProfile,
    Capacity,
    batch_key,
    policy_named,
    run_calls,
    worthwhile,
)
from s2p_deploy.serve.generation_task import EngineCall, GenerationTask, pause
from s2p_deploy.serve.request import ImageRequest, RequestFuture

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from s2p_deploy.serve.batching import Batching

CAPACITY = Capacity(samples=4, requests=8)


TOKENS = 24  # of a chunk; a prompt of a request has as many chunks as it has words


def future(
    name: str, steps: int = 3, guidance: float = 2.0, size: tuple[int, int] | None = None, prompt: str = "one"
) -> RequestFuture:
    request = ImageRequest(prompt, steps, guidance, 0, size=size)
    return RequestFuture(name, request, calls=steps, submitted=0.0, deadline=1.0)


def begun(one: RequestFuture) -> GenerationTask:
    """A task that calls the engine at once, once per step."""
    samples = one.request.samples
    height, width = one.request.size or (8, 8)

    def draw() -> Image.Image:
        for step in range(one.request.steps):
            sample = np.zeros((samples, 4, height, width), np.float32)
            text = np.zeros((samples, TOKENS * len(one.request.prompt.split()), 8), np.float32)
            inputs = {"sample": sample, "timestep_index": np.full(samples, step), "encoder_hidden_states": text}
            pause(EngineCall(inputs))
        return Image.new("RGB", (8, 8))

    task = GenerationTask(one, draw)
    task.resume()
    return task


@dataclass
class Engine:
    """What a service does around a policy, without time: ``turn`` runs one batch and returns the requests in it."""

    policy: BatchingPolicy
    waiting: list[RequestFuture]
    capacity: Capacity = CAPACITY
    active: list[GenerationTask] = field(default_factory=list)

    def turn(self) -> list[str]:
        begin = self.policy.admit(self.active, self.waiting, self.capacity)
        self.waiting = [one for one in self.waiting if one not in begin]
        self.active += map(begun, begin)
        keys = [
            batch_key(one.waiting_for, mixed_timesteps=True) if isinstance(one.waiting_for, EngineCall) else None
            for one in self.active
        ]
        chosen = self.policy.next_batch(self.active, keys, self.capacity)
        assert len({keys[self.active.index(task)] for task in chosen}) <= 1, "one batch, one key"
        assert sum(one.samples for one in chosen) <= self.capacity.samples or len(chosen) == 1
        for task in chosen:
            task.resume({})
        self.active = [task for task in self.active if task.picture is None]
        return [task.future.id for task in chosen]

    def turns(self, count: int) -> list[list[str]]:
        return [self.turn() for _ in range(count)]


def test_step_by_step_a_request_joins_those_that_are_under_way() -> None:
    engine = Engine(policy_named("step"), [future("long", 3)])
    assert engine.turns(1) == [["long"]]
    engine.waiting.append(future("short", 1))
    assert engine.turns(2) == [["long", "short"], ["long"]]
    assert not engine.active


def test_step_by_step_a_full_batch_goes_to_the_oldest() -> None:
    engine = Engine(policy_named("step"), [future(name, 2) for name in "abc"])
    assert engine.turns(4) == [["a", "b"], ["a", "b"], ["c"], ["c"]]


def test_step_by_step_guided_and_unguided_share_a_batch() -> None:
    engine = Engine(policy_named("step"), [future("guided", 1), future("plain", 1, guidance=1.0)])
    assert engine.turns(1) == [["guided", "plain"]]


def test_step_by_step_sizes_take_turns() -> None:
    large = [future(f"large{i}", 2, size=(16, 16)) for i in range(2)]
    engine = Engine(policy_named("step"), [future("a", 2), *large, future("b", 2)])
    assert engine.turns(4) == [["a", "b"], ["large0", "large1"]] * 2


@pytest.mark.parametrize("batching", ["step", "request"])
def test_prompts_of_other_numbers_of_chunks_take_turns(batching: Batching) -> None:
    """No step joins them: without a mask, padding would change the picture."""
    long = [future(f"long{i}", 2, prompt="one two three") for i in range(2)]
    capacity = Capacity(samples=8, requests=8)
    engine = Engine(policy_named(batching), [future("a", 2), *long, future("b", 2)], capacity)
    assert engine.turns(4) == [["a", "b"], ["long0", "long1"]] * 2
    assert not engine.active


def test_step_by_step_few_begin_ahead_of_their_place() -> None:
    engine = Engine(policy_named("step"), [future(str(i)) for i in range(8)])
    engine.turn()
    assert [task.future.id for task in engine.active] == ["0", "1", "2", "3"], "two run, two are ready"


def test_no_more_begin_than_there_is_capacity_for() -> None:
    engine = Engine(policy_named("step"), [future(str(i)) for i in range(4)], Capacity(samples=16, requests=3))
    engine.turn()
    assert len(engine.active) == 3


def test_request_by_request_only_one_schedule_runs_at_a_time() -> None:
    waiting = [future("a", 2), future("other", 1), future("b", 2), future("c", 2)]
    engine = Engine(policy_named("request"), waiting)
    assert engine.turns(5) == [["a", "b"], ["a", "b"], ["other"], ["c"], ["c"]]


def test_one_by_one() -> None:
    engine = Engine(policy_named("one"), [future("a", 2), future("b", 1)])
    assert engine.turns(3) == [["a"], ["a"], ["b"]]


def test_engines_of_one_timestep_per_batch_get_calls_of_one_timestep() -> None:
    calls = [EngineCall({"sample": np.zeros((2, 4, 8, 8)), "timestep_index": np.full(2, index)}) for index in (7, 7, 9)]
    assert len({batch_key(call, mixed_timesteps=False) for call in calls}) == 2
    assert len({batch_key(call, mixed_timesteps=True) for call in calls}) == 1


def test_a_request_larger_than_the_largest_batch_runs_alone() -> None:
    engine = Engine(policy_named("step"), [future("a", 1), future("b", 1)], Capacity(samples=1, requests=4))
    assert engine.turns(2) == [["a"], ["b"]]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InputError, match="unknown batching 'all': use one of step, request, one"):
        policy_named("all")  # type: ignore[arg-type]


@given(
    st.sampled_from(BATCHINGS),
    st.lists(
        st.tuples(
            st.integers(1, 6),
            st.sampled_from([1.0, 2.0]),
            st.sampled_from([None, (16, 16), (16, 8)]),
            st.sampled_from(["one", "one two three"]),
        ),
        max_size=12,
    ),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_every_request_is_drawn_in_as_many_turns_as_there_are_steps(
    batching: Batching, wanted: list[Any], samples: int, requests: int
) -> None:
    waiting = [future(str(i), *options) for i, options in enumerate(wanted)]
    engine = Engine(policy_named(batching), list(waiting), Capacity(samples, requests))
    steps = sum(one.request.steps for one in waiting)
    turns = [engine.turn() for _ in range(steps)]
    assert not engine.active
    assert not engine.waiting
    ran = [name for turn in turns for name in turn]
    assert {one.id: ran.count(one.id) for one in waiting} == {one.id: one.request.steps for one in waiting}


class Adding(ClosingRunner):
    """Adds each sample's timestep index to it."""

    seen = 0

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.seen = len(inputs["sample"])
        return {"noise_pred": inputs["sample"] + inputs["timestep_index"].reshape(-1, 1, 1, 1)}

    def close(self) -> None: ...


@pytest.mark.parametrize("batch", [3, 4, 8])
def test_every_call_gets_the_result_of_its_own_samples_and_timesteps(batch: int) -> None:
    calls = [
        EngineCall({"sample": np.full((n, 1, 2, 2), 10.0 * n), "timestep_index": np.full(n, index)})
        for n, index in ((2, 5), (1, 7))
    ]
    runner = Adding()
    results = run_calls(runner, calls, batch)
    assert runner.seen == batch
    assert [result["noise_pred"].shape for result in results] == [(2, 1, 2, 2), (1, 1, 2, 2)]
    assert [set(result["noise_pred"].ravel()) for result in results] == [{25.0}, {17.0}]


def test_the_largest_is_the_smallest_batch_near_the_best_time_per_sample() -> None:
    found = worthwhile({1: 2.0, 2: 3.0, 4: 4.2, 8: 8.0, 16: 16.5})  # per sample 2, 1.5, 1.05, 1, 1.03
    assert found == BatchProfile((1, 2, 4), (2.0, 3.0, 4.2))
    assert found.largest == 4
    assert found.seconds_per_sample == pytest.approx(1.05)


def test_an_engine_that_gains_nothing_is_given_one_sample_at_a_time() -> None:
    assert worthwhile({1: 1.0, 2: 2.0, 4: 4.0}).largest == 1


@pytest.mark.parametrize(("samples", "padded"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 9)])
def test_batches_are_padded_to_the_next_profiled_one(samples: int, padded: int) -> None:
    assert BatchProfile((2, 4, 8), (1.0, 1.0, 1.0)).padded(samples) == padded


class _Sums(ClosingRunner):
    """Adds a residual's mean to every sample."""

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        own = inputs["sample"] + inputs["mid_residual"].mean((1, 2, 3), keepdims=True)
        return {"noise_pred": own}

    def close(self) -> None:
        """Nothing to free."""


def test_samples_without_a_control_get_zeros_beside_those_that_have_one() -> None:
    def call(samples: int, residual: float | None) -> EngineCall:
        inputs = {"sample": np.ones((samples, 4, 2, 2), np.float32), "timestep_index": np.zeros(samples, np.int64)}
        if residual is not None:
            inputs["mid_residual"] = np.full((samples, 3, 1, 1), residual, np.float32)
        return EngineCall(inputs)

    calls = [call(2, None), call(1, 5.0), call(2, 7.0)]
    assert len({batch_key(one, mixed_timesteps=True) for one in calls}) == 1
    outputs = run_calls(_Sums(), calls, 8)
    assert [float(one["noise_pred"].mean()) for one in outputs] == [1.0, 6.0, 8.0]
    assert [len(one["noise_pred"]) for one in outputs] == [2, 1, 2]
