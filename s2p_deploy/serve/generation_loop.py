"""The generation loop: one thread that admits requests, forms batches, runs the engine and resumes every task.

Other threads reach it through the request queue alone: they put requests in, results of background tasks, word that a
LoRA is no longer needed, and the order to stop. A request is waiting (in the queue), then active (a generation task),
then done (its future is).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from s2p_deploy.engines.runner import OUTPUT
from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.serve.batching import batch_key, fitting, run_calls
from s2p_deploy.serve.generation_task import BackgroundTask, EngineCall, GenerationTask
from s2p_deploy.serve.loras import BatchedLoras
from s2p_deploy.serve.request import CancelledRequestError, ClosingError, DeadlineError, RequestFuture, StoppedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor, Future

    from PIL.Image import Image

    from s2p_deploy.serve.batching import BatchingPolicy, Capacity, Output
    from s2p_deploy.serve.controlnets import ServedControlNet
    from s2p_deploy.serve.service import ServedEngine

Ending = Literal["drawn", "cancelled", "late", "refused", "failed"]

LOG = logging.getLogger("s2p_deploy.serve")
_POLL_SECONDS = 0.05  # between looks at requests that were cancelled or are late, while nothing else happens
_MOST_FAILURES = 3  # of the engine in a row: one may be a request's own fault, a lost device fails every call
_ENDINGS: dict[type[BaseException], Ending] = {
    CancelledRequestError: "cancelled",
    DeadlineError: "late",
    ClosingError: "refused",
    InputError: "refused",
}


class Observer:
    """Receives the events of a service, in the service's own thread; does nothing with them unless overridden."""

    def ran_batch(self, samples: int, padded: int, pictures: int, seconds: float) -> None:
        """Records an engine run: ``samples`` latents of ``pictures`` requests, ``padded`` to a profiled batch."""

    def ended(self, future: RequestFuture, ending: Ending, seconds: float) -> None:
        """Records that a request ended, ``seconds`` after it was submitted."""


class RequestQueue:
    """Thread-safe. Only the generation loop takes anything out; others only put in."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[RequestFuture] = deque()
        self._results: deque[tuple[GenerationTask, Future[object]]] = deque()
        self._active = 0
        self._woken = False
        self._refusal: S2PError | None = None
        self._stopped = False

    @property
    def waiting(self) -> int:
        """Requests that have not begun and are not cancelled."""
        with self._changed:
            return len(self._wanted())

    @property
    def active(self) -> int:
        """Requests that have begun."""
        return self._active

    @property
    def stopped(self) -> bool:
        """Returns whether the loop is to end."""
        return self._stopped

    def put(
        self, future: RequestFuture, refusal: Callable[[tuple[RequestFuture, ...]], S2PError | None] | None = None
    ) -> None:
        """Appends a request, unless ``refusal`` returns an error for what waits already.

        Raises:
            ClosingError, StoppedError: nothing is accepted any more.
        """
        with self._changed:
            error = self._refusal or (refusal(self._wanted()) if refusal else None)
            if error is not None:
                raise error
            self._waiting.append(future)
            self._changed.notify_all()

    def put_result(self, task: GenerationTask, result: Future[object]) -> None:
        """Appends the completed background task that a generation task is paused for."""
        with self._changed:
            self._results.append((task, result))
            self._changed.notify_all()

    def take_results(self) -> list[tuple[GenerationTask, Future[object]]]:
        """Removes and returns all results that came since."""
        with self._changed:
            results = list(self._results)
            self._results.clear()
        return results

    def futures(self) -> tuple[RequestFuture, ...]:
        """Lists what waits, oldest first."""
        with self._changed:
            return tuple(self._waiting)

    def remove(self, futures: list[RequestFuture], active: int) -> None:
        """Takes requests out; ``active`` is how many are active from now on."""
        with self._changed:
            self._waiting = deque(future for future in self._waiting if future not in futures)
            self._active = active
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Blocks until something comes, or ``seconds`` have passed while requests are waiting or active."""
        with self._changed:
            idle = not (self._waiting or self._active)
            self._changed.wait_for(
                lambda: self._stopped or self._woken or self._results or (idle and self._waiting),
                None if idle else seconds,
            )
            self._woken = False

    def wake(self) -> None:
        """Ends the :meth:`wait` of now, or the next one."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def refuse(self, error: S2PError) -> None:
        """Accepts nothing more: :meth:`put` raises ``error``, or the first one that was given here."""
        with self._changed:
            self._refusal = self._refusal or error

    def wait_until_empty(self, seconds: float) -> bool:
        """Blocks until nothing is waiting or active, for ``seconds`` at most; returns whether that came about."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._active or self._results), seconds)

    def stop(self) -> None:
        """Tells the loop to end."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _wanted(self) -> tuple[RequestFuture, ...]:
        """Lists what is not cancelled: that holds no place, though the loop, in the midst of a step, ends it later."""
        return tuple(future for future in self._waiting if not future.cancel_requested)


class GenerationLoop:
    """Everything that happens in a service's thread. ``background`` runs the background tasks."""

    def __init__(
        self,
        engine: ServedEngine,
        policy: BatchingPolicy,
        capacity: Capacity,
        queue: RequestQueue,
        background: Executor,
        observer: Observer,
    ) -> None:
        self._engine, self._policy, self._capacity = engine, policy, capacity
        self._queue, self._background, self._observer = queue, background, observer
        self._active: list[GenerationTask] = []
        self._loras = BatchedLoras(engine.loras)
        self._failures = 0  # of the engine, since it last ran

    @property
    def healthy(self) -> bool:
        """Returns whether the engine runs, as far as its last calls show. One that succeeds makes it healthy again."""
        return self._failures < _MOST_FAILURES

    def run(self) -> None:
        """Runs until the queue is stopped. Whatever ends the loop, no future stays open and none is accepted."""
        try:
            with torch.no_grad():  # of this thread: tasks switch it on and off in any order
                while not self._queue.stopped:
                    if not self._turn():
                        self._queue.wait(_POLL_SECONDS)
                closed = ClosingError("the service was stopped before this picture was done: ask again")
                self._end_where(lambda _future: closed)
        except Exception:  # a defect: nobody else sees what ends a thread
            LOG.exception("the generation loop ended by a defect")
            self._abandon(StoppedError("the model has stopped by a defect: the server's log says more"))

    def _turn(self) -> bool:
        """Runs one batch, if there is one to run."""
        for task, result in self._queue.take_results():
            if task in self._active:
                error = result.exception()
                if error is None:
                    self._advance(task, task.resume, result.result())
                else:
                    self._advance(task, task.throw, error)
        now = time.monotonic()
        self._end_where(lambda future: _overdue(future, now))
        self._loras.prune()
        self._admit()
        return self._run_batch()

    def _end_where(self, reason: Callable[[RequestFuture], S2PError | None]) -> None:
        """Ends every request, waiting or active, that ``reason`` returns an error for."""
        ended = {future: error for future in self._queue.futures() if (error := reason(future))}
        for future, error in ended.items():
            self._complete(future, error)
        self._queue.remove(list(ended), len(self._active))
        for task in tuple(self._active):
            error = reason(task.future)
            if error:
                self._advance(task, task.throw, error)

    def _admit(self) -> None:
        waiting = self._loras.fitting(self._active, self._queue.futures())
        begin = self._policy.admit(self._active, waiting, self._capacity)
        if not begin:
            return
        tasks = [self._engine.task(future) for future in begin]
        self._active += tasks
        self._queue.remove(begin, len(self._active))
        for task in tasks:
            self._loras.begin(task.future)
            self._advance(task, task.resume)

    def _run_batch(self) -> bool:
        key = partial(batch_key, mixed_timesteps=self._engine.mixed_timesteps, runner=self._engine.stock.runner)
        waiting = [task.waiting_for for task in self._active]
        keys = [key(one) if isinstance(one, EngineCall) else None for one in waiting]
        chosen = self._policy.next_batch(self._active, keys, self._capacity)
        if not chosen:
            return False
        controlnet = _called(chosen[0]).controlnet
        if controlnet is None:
            results = self._predictions(chosen)
        else:
            chosen = fitting(chosen, controlnet.most or self._capacity.samples)
            results = self._outputs([_called(task) for task in chosen], controlnet)
        for task, result in zip(chosen, results, strict=True):
            self._advance(task, task.throw if isinstance(result, Exception) else task.resume, result)
        return True

    def _predictions(self, tasks: list[GenerationTask]) -> list[Output | Exception]:
        """Runs the calls of the denoiser that tasks wait for, as one batch, with their LoRAs."""
        calls = [_called(task) for task in tasks]
        samples = sum(call.samples for call in calls)
        start = time.perf_counter()
        outputs = self._outputs(self._loras.with_strengths(tasks, calls))
        results = [_checked(output, task) for output, task in zip(outputs, tasks, strict=True)]
        seconds = time.perf_counter() - start
        self._observer.ran_batch(samples, self._engine.profile.padded(samples), len(calls), seconds)
        return results

    def _outputs(self, calls: list[EngineCall], controlnet: ServedControlNet | None = None) -> list[Output | Exception]:
        """Runs calls as one batch; where that fails, each alone, so that one request's failure is not the others'.

        They are of the denoiser, or of a ``controlnet``.
        """
        samples = sum(call.samples for call in calls)
        try:
            if controlnet is None:
                outputs = run_calls(self._engine.runner, calls, self._engine.profile.padded(samples))
            else:
                outputs = run_calls(controlnet.runner, calls, samples)
        except Exception as error:  # an engine's errors have no class in common
            if len(calls) > 1:
                return [self._outputs([call], controlnet)[0] for call in calls]
            if not isinstance(error, InputError):  # which is the request's fault
                self._failures += 1
                if self._failures == _MOST_FAILURES:
                    LOG.exception("the engine failed %d times in a row: it counts as stopped", _MOST_FAILURES)
            return [error]
        self._failures = 0
        return list(outputs)

    def _advance(self, task: GenerationTask, step: Callable[..., None], *given: object) -> None:
        """Runs a task to its next pause; ends its request where it returns or raises."""
        try:
            step(*given)
        except Exception as error:  # whatever it is, it is this request's end and no other's
            self._leave(task, error)
            return
        if task.picture is not None:
            self._leave(task, task.picture)
        elif isinstance(task.waiting_for, BackgroundTask):
            run = self._background.submit(_without_gradients, task.waiting_for)
            run.add_done_callback(lambda result: self._queue.put_result(task, result))

    def _leave(self, task: GenerationTask, result: Image | Exception) -> None:
        self._active.remove(task)
        self._loras.end(task.future)
        self._complete(task.future, result)
        self._queue.remove([], len(self._active))

    def _complete(self, future: RequestFuture, result: Image | Exception) -> None:
        if isinstance(result, Exception):
            ending = _ENDINGS.get(type(result), "failed")
            future.set_exception(result)
        else:
            ending = "drawn"
            future.set_result(result)
        self._observer.ended(future, ending, time.monotonic() - future.submitted)

    def _abandon(self, error: S2PError) -> None:
        """Fails every request without a step more: neither tasks nor policy nor observer are trusted after a defect."""
        self._queue.refuse(error)
        futures = [*self._queue.futures(), *(task.future for task in self._active)]
        self._active.clear()
        self._queue.take_results()
        self._queue.remove(futures, 0)
        for future in futures:
            if not future.done():
                future.set_exception(error)
            with suppress(Exception):
                self._observer.ended(future, "failed", time.monotonic() - future.submitted)


def _called(task: GenerationTask) -> EngineCall:
    """Returns the call of a network that a task waits for."""
    assert isinstance(task.waiting_for, EngineCall), "the policy selects no others"
    return task.waiting_for


def _overdue(future: RequestFuture, now: float) -> S2PError | None:
    if future.cancel_requested:
        return CancelledRequestError("the client has left")
    if now > future.deadline:
        done, calls = future.progress
        how_far = f"after {done} of {calls} steps" if calls else "before it began"
        return DeadlineError(f"the time that was given ran out {how_far}: allow more, or ask for fewer steps")
    return None


def _checked(output: Output | Exception, task: GenerationTask) -> Output | Exception:
    """Replaces an output that holds NaN or infinity by an error.

    Of a GPU's outputs the last one of a picture alone is looked at, because that waits for the GPU: what is no number
    stays none to the end.
    """
    if isinstance(output, Exception):
        return output
    values = output[OUTPUT]
    if isinstance(values, torch.Tensor):
        finite = task.done + 1 < task.future.calls or bool(torch.isfinite(values).all())
    else:
        finite = bool(np.isfinite(values).all())
    if finite:
        return output
    return S2PError("the engine returned values that are no numbers: validate it (s2p-deploy validate)")


def _without_gradients(task: BackgroundTask) -> object:
    with torch.no_grad():
        return task.run()
