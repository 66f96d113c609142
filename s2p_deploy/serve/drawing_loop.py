"""The drawing thread: it admits requests, forms a batch, runs the engine, and hands every drawing its answer."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.engines.runner import OUTPUT
from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.serve.drawing import Drawing, EngineCall, SideTask
from s2p_deploy.serve.engine_batch import call_key, run_calls
from s2p_deploy.serve.inbox import Answer
from s2p_deploy.serve.request import ClosingError, GivenUpError, LateError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from numpy.typing import NDArray
    from PIL.Image import Image

    from s2p_deploy.serve.batching import Room, Sharing
    from s2p_deploy.serve.inbox import Inbox
    from s2p_deploy.serve.observer import Ending, Observer
    from s2p_deploy.serve.served_engine import ServedEngine
    from s2p_deploy.serve.ticket import Ticket

_LOOK_AGAIN = 0.05  # seconds, at requests that were given up or are late while nothing else happens

_ENDINGS: dict[type[BaseException], Ending] = {
    GivenUpError: "cancelled",
    LateError: "late",
    ClosingError: "refused",
    InputError: "refused",
}


class DrawingLoop:
    """All that happens in the drawing thread. ``aside`` runs the side tasks."""

    def __init__(
        self, served: ServedEngine, sharing: Sharing, room: Room, inbox: Inbox, aside: Executor, observer: Observer
    ) -> None:
        self._served, self._sharing, self._room = served, sharing, room
        self._inbox, self._aside, self._observer = inbox, aside, observer
        self._active: list[Drawing] = []

    def run(self) -> None:
        """Until the inbox is stopped; then whatever is left ends with ClosingError."""
        with torch.no_grad():  # of this thread: drawings switch it on and off in any order
            while not self._inbox.stopped:
                if not self.turn():
                    self._inbox.wait(_LOOK_AGAIN)
            error = ClosingError("the service was stopped before this picture was done: ask again")
            self._drop(lambda _ticket: error)

    def turn(self) -> bool:
        """One batch, if there is one to run."""
        for answer in self._inbox.take_answers():
            if answer.drawing in self._active:
                self._advance(answer.drawing, partial(_take, answer))
        now = time.monotonic()
        self._drop(lambda ticket: _lost(ticket, now))
        self._admit()
        return self._run_batch()

    def _drop(self, lost: Callable[[Ticket], S2PError | None]) -> None:
        waiting = [(ticket, error) for ticket in self._inbox.tickets() if (error := lost(ticket))]
        self._inbox.remove([ticket for ticket, _ in waiting])
        for ticket, error in waiting:
            self._end(ticket, error)
        for drawing in tuple(self._active):
            error = lost(drawing.ticket)
            if error:
                self._advance(drawing, partial(drawing.fail, error))

    def _admit(self) -> None:
        begin = self._sharing.admitted(self._active, self._inbox.tickets(), self._room)
        if not begin:
            return
        drawings = [self._served.drawing(ticket) for ticket in begin]
        self._active += drawings
        self._inbox.tell_active(len(self._active))
        self._inbox.remove(begin)
        for drawing in drawings:
            self._advance(drawing, drawing.go_on)

    def _run_batch(self) -> bool:
        chosen = self._sharing.chosen(self._active, [self._key(drawing) for drawing in self._active], self._room)
        if not chosen:
            return False
        calls = [drawing.wants for drawing in chosen if isinstance(drawing.wants, EngineCall)]
        samples = sum(call.samples for call in calls)
        batch = self._served.profile.padded(samples)
        start = time.perf_counter()
        answers = self._answers(calls, batch)
        self._observer.ran_batch(samples, batch, len(calls), time.perf_counter() - start)
        for drawing, answer in zip(chosen, answers, strict=True):
            step = partial(drawing.fail, answer) if isinstance(answer, Exception) else partial(drawing.go_on, answer)
            self._advance(drawing, step)
        return True

    def _key(self, drawing: Drawing) -> tuple[object, ...] | None:
        wanted = drawing.wants
        return call_key(wanted, mixed_rows=self._served.mixed_rows) if isinstance(wanted, EngineCall) else None

    def _answers(self, calls: list[EngineCall], batch: int) -> list[dict[str, NDArray[Any]] | Exception]:
        """Of each call; where the batch fails, of each alone, so that one request's failure is not the others'."""
        try:
            return [_finite(answer) for answer in run_calls(self._served.runner, calls, batch)]
        except Exception as error:  # an engine's errors have no class in common
            if len(calls) == 1:
                return [error]
            return [self._answers([call], self._served.profile.padded(call.samples))[0] for call in calls]

    def _advance(self, drawing: Drawing, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # whatever it is, it is this request's end and no other's
            self._leave(drawing, error)
            return
        if drawing.picture is not None:
            self._leave(drawing, drawing.picture)
        elif isinstance(drawing.wants, SideTask):
            task = self._aside.submit(_without_gradients, drawing.wants)
            task.add_done_callback(lambda given: self._inbox.put_answer(Answer(drawing, given)))

    def _leave(self, drawing: Drawing, result: Image | Exception) -> None:
        self._active.remove(drawing)
        self._end(drawing.ticket, result)
        self._inbox.tell_active(len(self._active))

    def _end(self, ticket: Ticket, result: Image | Exception) -> None:
        if isinstance(result, Exception):
            ending = _ENDINGS.get(type(result), "failed")
            ticket.picture.set_exception(result)
        else:
            ending = "drawn"
            ticket.picture.set_result(result)
        self._observer.ended(ticket, ending, time.monotonic() - ticket.taken)


def _take(answer: Answer) -> None:
    error = answer.given.exception()
    if error is None:
        answer.drawing.go_on(answer.given.result())
    else:
        answer.drawing.fail(error)


def _lost(ticket: Ticket, now: float) -> S2PError | None:
    if ticket.given_up.is_set():
        return GivenUpError("the request was given up")
    if now > ticket.deadline:
        done, calls = ticket.progress
        how_far = f"after {done} of {calls} steps" if calls else "before it began"
        return LateError(f"the time that was given ran out {how_far}: allow more, or ask for fewer steps")
    return None


def _finite(answer: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]] | Exception:
    if np.isfinite(answer[OUTPUT]).all():
        return answer
    return S2PError("the engine gave values that are no numbers: validate it (s2p-deploy validate)")


def _without_gradients(task: SideTask) -> object:
    with torch.no_grad():
        return task.run()
