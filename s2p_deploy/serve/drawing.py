"""A request's stock pipeline, run as a coroutine: it pauses wherever it needs the engine or another slow network.

diffusers' pipelines are one long call each. Run in a greenlet of its own, such a call stops inside the denoiser, many
of them wait there side by side, and the service answers as many as fit into one batch of the engine. Everything else
(text, guidance, scheduler, autoencoder) stays diffusers' own code, with the request's own scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent, greenlet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from PIL.Image import Image

    from s2p_deploy.serve.ticket import Ticket


@dataclass(frozen=True)
class EngineCall:
    """One call of the denoiser, with the inputs of a bound engine; it is answered with the outputs."""

    inputs: Mapping[str, NDArray[Any]]

    @property
    def samples(self) -> int:
        """Latents in the call: two where the picture is guided, else one."""
        return len(self.inputs["step_index"])


@dataclass(frozen=True)
class SideTask:
    """Work that need not hold up the engine, such as encoding a text; it is answered with what ``run`` returns."""

    run: Callable[[], object]


def pause(wanted: EngineCall | SideTask) -> Any:  # noqa: ANN401 - the answer is what was wanted
    """Stops the drawing that this is called in until it is answered.

    Raises:
        RuntimeError: called outside a drawing.
    """
    outside = getcurrent().parent
    if outside is None:
        raise RuntimeError("only a drawing can pause")
    return outside.switch(wanted)


class Drawing:
    """A picture on its way; all of it runs in the thread that starts it.

    ``wants`` is what it waits for: an answer, or nothing any more once ``picture`` is there. ``calls`` is how often it
    will call the engine. What ``draw`` raises comes out of :meth:`go_on` and :meth:`stop`.
    """

    def __init__(self, ticket: Ticket, draw: Callable[[], Image], calls: int, samples: int) -> None:
        self.ticket, self.calls, self.samples = ticket, calls, samples
        self.done = 0
        self.wants: EngineCall | SideTask | None = None
        self.picture: Image | None = None
        self._greenlet = greenlet(draw)

    @property
    def denoised(self) -> bool:
        """Whether the engine has done all that it has to for this picture."""
        return self.done >= self.calls

    def go_on(self, *answer: object) -> None:
        """Runs on to the next pause, from the beginning or with the answer that was waited for."""
        if isinstance(self.wants, EngineCall):
            self.done += 1
            self.ticket.tell_progress(self.done, self.calls)
        self._take(self._greenlet.switch(*answer))

    def fail(self, error: BaseException) -> None:
        """Raises an error where the drawing waits."""
        self._take(self._greenlet.throw(error))

    def _take(self, given: Any) -> None:  # noqa: ANN401 - a pause, or the picture at the end
        ended = self._greenlet.dead
        self.picture = given if ended else None
        self.wants = None if ended else given
