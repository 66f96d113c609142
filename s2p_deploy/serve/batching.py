"""Forms the engine's batches: how large they are worth being, which requests share one, and how one is run.

Three policies: with ``step`` (continuous batching, which one scale per timestep allows) a batch is formed anew at every
step, from requests at any step of any step count. With ``request`` requests of the same schedule are drawn together
from the first step to the last, and others wait. With ``one`` requests are drawn one after the other.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from s2p_deploy.bench.worker import random_inputs
from s2p_deploy.engines.runner import TensorRunner
from s2p_deploy.errors import InputError
from s2p_deploy.records.optional_inputs import is_optional
from s2p_deploy.serve.generation_task import EngineCall

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.engines import BoundRunner, Runner
    from s2p_deploy.serve.controlnets import ServedControlNet
    from s2p_deploy.serve.generation_task import GenerationTask
    from s2p_deploy.serve.request import ImageRequest, RequestFuture

    Output = dict[str, Any]  # arrays or tensors, as the inputs

Batching = Literal["step", "request", "one"]
BATCHINGS: tuple[Batching, ...] = ("step", "request", "one")


class BatchKey(NamedTuple):
    """What calls of one batch share; ``stage`` is which of joined engines runs them."""

    controlnet: ServedControlNet | None
    stage: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    timesteps: tuple[int, ...]


_AHEAD = 2  # requests that begin before a batch has room for them, so that their texts are encoded by then
_NEAR_BEST = 1.1  # times the best seconds per sample: a larger batch than the first that is so near gains too little
_TIMED_RUNS = 5


@dataclass(frozen=True)
class Capacity:
    """``samples`` is the largest batch worth forming, ``requests`` how many are drawn at once."""

    samples: int
    requests: int


class BatchingPolicy(Protocol):
    """Decides which requests begin and which of those that have begun share the next batch."""

    def admit(
        self, active: Sequence[GenerationTask], waiting: Iterable[RequestFuture], capacity: Capacity
    ) -> list[RequestFuture]:
        """Selects those of the waiting, oldest first, that begin now."""

    def next_batch(
        self, active: Sequence[GenerationTask], keys: Sequence[BatchKey | None], capacity: Capacity
    ) -> list[GenerationTask]:
        """Selects those of the active, oldest first, that run next; ``keys`` is theirs, None where no call waits."""


def policy_named(batching: Batching) -> BatchingPolicy:
    """Makes a policy by its name. Raises InputError where there is none of that name."""
    if batching == "step":
        return ContinuousBatching()
    if batching not in BATCHINGS:
        raise InputError(f"unknown batching {batching!r}: use one of {', '.join(BATCHINGS)}")
    return RequestLevelBatching(alone=batching == "one")


class ContinuousBatching:
    """A new batch at every step. Batch keys take turns; among requests of one key the oldest go first."""

    def __init__(self) -> None:
        self._last_turn: dict[BatchKey, int] = {}  # in which each key ran last
        self._turn = 0

    def admit(
        self, active: Sequence[GenerationTask], waiting: Iterable[RequestFuture], capacity: Capacity
    ) -> list[RequestFuture]:
        """Selects as many as fill a batch of every picture size, and a few more, whose texts are encoded meanwhile."""
        load: Counter[object] = Counter()
        for task in active:
            load[task.future.request.size] += 0 if task.denoised else task.samples
        begin: list[RequestFuture] = []
        for future in waiting:
            samples, size = future.request.samples, future.request.size
            if len(active) + len(begin) >= capacity.requests:
                break
            if load[size] + samples <= capacity.samples + _AHEAD * samples:
                load[size] += samples
                begin.append(future)
        return begin

    def next_batch(
        self, active: Sequence[GenerationTask], keys: Sequence[BatchKey | None], capacity: Capacity
    ) -> list[GenerationTask]:
        """Selects requests of the key that has waited longest, of a ControlNet's where there are some."""
        present = list(dict.fromkeys(_due(keys)))
        if not present:
            return []
        key = min(present, key=lambda one: self._last_turn.get(one, -1))
        self._turn += 1
        self._last_turn = {one: turn for one, turn in self._last_turn.items() if one in present} | {key: self._turn}
        return fitting([task for task, own in zip(active, keys, strict=True) if own == key], capacity.samples)


@dataclass(frozen=True)
class RequestLevelBatching:
    """Requests of one schedule from the first step to the last, or ``alone``, each by itself."""

    alone: bool

    def admit(
        self, active: Sequence[GenerationTask], waiting: Iterable[RequestFuture], capacity: Capacity
    ) -> list[RequestFuture]:
        """Selects, once all that have begun are denoised, the oldest and those with the same schedule."""
        if not all(task.denoised for task in active):
            return []
        begin: list[RequestFuture] = []
        for future in waiting:
            if begin and _group(future.request) != _group(begin[0].request):
                continue
            if begin and (self.alone or (len(begin) + 1) * future.request.samples > capacity.samples):
                break
            begin.append(future)
        return begin

    def next_batch(
        self, active: Sequence[GenerationTask], keys: Sequence[BatchKey | None], capacity: Capacity
    ) -> list[GenerationTask]:
        """Selects the group once every request of it waits for the engine; parts of it take turns, where keys differ.

        They do where prompts have other numbers of tokens.
        """
        keyed = [(task, key) for task, key in zip(active, keys, strict=True) if not task.denoised]
        if not keyed or not all(isinstance(task.waiting_for, EngineCall) for task, _ in keyed):
            return []
        due = _due([key for _, key in keyed])
        _, turn = min((one for one in keyed if one[1] in due), key=lambda one: one[0].done)
        return fitting([task for task, key in keyed if key == turn], capacity.samples)


def batch_key(call: EngineCall, *, mixed_timesteps: bool, runner: BoundRunner | None = None) -> BatchKey:
    """Computes what calls of one batch must share: network, shapes, and the timestep where an engine takes only one.

    ``mixed_timesteps`` says whether the denoiser takes several. ``runner`` is the denoiser's, which may be two engines
    (None: it is one). Inputs of adapters need not be shared: where a call has
    none, its samples get zeros.
    """
    inputs: dict[str, Any] = dict(call.inputs)
    shapes = tuple((name, tuple(inputs[name].shape[1:])) for name in sorted(inputs) if not is_optional(name))
    mixed = mixed_timesteps if call.controlnet is None else call.controlnet.mixed_timesteps
    timesteps = () if mixed else tuple(sorted(set(call.inputs["timestep_index"].tolist())))
    stage = 0
    if runner is not None and call.controlnet is None:
        stage = runner.stage(int(call.inputs["timestep_index"][0]))
    return BatchKey(call.controlnet, stage, shapes, timesteps)


def run_calls(runner: Runner, calls: Sequence[EngineCall], batch: int) -> list[Output]:
    """Runs a network once at ``batch`` samples and returns the outputs of every call, in order.

    Samples that are missing to the batch repeat the first one: a batch of fixed size is what engines are fastest at,
    and at equal size no sample's bits depend on its neighbours. Tensors are joined and divided on their device, and the
    host waits for nothing.
    """
    sizes = [call.samples for call in calls]
    missing = max(0, batch - sum(sizes))
    given: dict[str, Any] = {name: value for call in calls for name, value in call.inputs.items()}
    pieces: dict[str, list[Any]] = {}
    for name, like in given.items():
        each = [call.inputs[name] if name in call.inputs else _zeros(call.samples, like) for call in calls]
        pieces[name] = [*each, *[each[0][:1]] * missing]
    results: list[Output] = [{} for _ in calls]
    if calls[0].on_device:
        assert isinstance(runner, TensorRunner), "its pausing runner is one"
        given = {name: torch.cat(tensors) for name, tensors in pieces.items()}
        for name, output in runner.infer_tensors(given).items():
            kept = output[: sum(sizes)].clone()  # the runner writes its memory again in the next call
            for result, part in zip(results, kept.split(sizes), strict=True):
                result[name] = part
        return results
    for name, array in runner.infer({name: np.concatenate(arrays) for name, arrays in pieces.items()}).items():
        for result, part in zip(results, np.split(array, np.cumsum(sizes))[: len(calls)], strict=True):
            result[name] = part
    return results


def _zeros(samples: int, like: NDArray[Any] | Tensor) -> NDArray[Any] | Tensor:
    """Makes what samples get that have not the input of an adapter which others of their batch have."""
    shape = (samples, *like.shape[1:])
    return like.new_zeros(shape) if isinstance(like, torch.Tensor) else np.zeros(shape, like.dtype)


@dataclass(frozen=True)
class BatchProfile:
    """Batch sizes, ascending, and the seconds that the engine takes for each at its best."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def largest(self) -> int:
        """Returns the largest batch that is worth forming."""
        return self.sizes[-1]

    @property
    def seconds_per_sample(self) -> float:
        """Seconds per sample at the largest batch."""
        return self.seconds[-1] / self.sizes[-1]

    def padded(self, samples: int) -> int:
        """Rounds a number of samples up to a profiled batch; fewer or more than any profiled one stay as they are."""
        if samples < self.sizes[0]:
            return samples
        return next((size for size in self.sizes if size >= samples), samples)


def profile_batches(runner: BoundRunner, timestep_index: int, sizes: Sequence[int]) -> BatchProfile:
    """Times the engine at every size and keeps those up to the first within 10 % of the best time per sample.

    Every size is compiled for where the backend gains by it (:meth:`BoundRunner.tune`); sizes outside the engine's
    profile are left out. ``timestep_index`` is any that the engine has scales for.
    """
    allowed = [size for size in sizes if runner.profile.minimum <= size <= runner.profile.maximum]
    allowed = allowed or [runner.profile.optimum]
    runner.tune(*allowed)
    return worthwhile({size: _seconds(runner, timestep_index, size) for size in allowed})


def worthwhile(seconds: Mapping[int, float]) -> BatchProfile:
    """Makes a profile of measured seconds by batch size, without the sizes that gain too little."""
    best = min(time / size for size, time in seconds.items())
    largest = min(size for size, time in seconds.items() if time / size <= _NEAR_BEST * best)
    sizes = tuple(sorted(size for size in seconds if size <= largest))
    return BatchProfile(sizes, tuple(seconds[size] for size in sizes))


def _seconds(runner: BoundRunner, timestep_index: int, batch: int) -> float:
    """Measures the fastest of a few runs: whatever else the machine does only ever adds time."""
    inputs = random_inputs(runner.inputs, runner.profile.sizes("optimum") | {"batch": batch}, timestep_index, 0)
    runner.infer(inputs)  # warms up
    fastest = float("inf")
    for _ in range(_TIMED_RUNS):
        start = time.perf_counter()
        runner.infer(inputs)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _group(request: ImageRequest) -> tuple[object, ...]:
    start = None if request.start is None else (request.start.strength, request.start.mask is None)
    return request.steps, request.scheduler, request.size, request.samples, start


def _due(keys: Sequence[BatchKey | None]) -> list[BatchKey]:
    """Selects the keys that may run next: the denoiser waits for ControlNets, so that all meet in its batch."""
    present = [key for key in keys if key is not None]
    return [key for key in present if key.controlnet is not None] or present


def fitting(tasks: Sequence[GenerationTask], samples: int) -> list[GenerationTask]:
    """Selects the first tasks that fit into a batch; always one."""
    chosen: list[GenerationTask] = []
    for task in tasks:
        if chosen and sum(one.samples for one in chosen) + task.samples > samples:
            break
        chosen.append(task)
    return chosen
