"""Who is drawn with whom: three ways to share an engine, the first of them being what one scale per timestep allows.

``step``: a batch is formed anew at every step, from requests at any step of any step count. ``request``: requests of
the same schedule are drawn together from the first step to the last; others wait. ``one``: one after the other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from s2p_deploy.errors import InputError
from s2p_deploy.serve.drawing import EngineCall

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from s2p_deploy.serve.drawing import Drawing
    from s2p_deploy.serve.engine_batch import CallKey
    from s2p_deploy.serve.request import ImageRequest
    from s2p_deploy.serve.ticket import Ticket

Batching = Literal["step", "request", "one"]
BATCHINGS: tuple[Batching, ...] = ("step", "request", "one")
_AHEAD = 2  # requests that begin before there is room for them in a batch


@dataclass(frozen=True)
class Room:
    """``samples`` is the largest batch worth forming, ``drawings`` how many requests are drawn at once."""

    samples: int
    drawings: int


class Sharing(Protocol):
    """A way to share an engine."""

    def admitted(self, active: Sequence[Drawing], waiting: Iterable[Ticket], room: Room) -> list[Ticket]:
        """Those of the waiting, oldest first, that begin now."""

    def chosen(self, active: Sequence[Drawing], keys: Sequence[CallKey | None], room: Room) -> list[Drawing]:
        """Those of the active, oldest first, that run next; ``keys`` is theirs, None where no call waits."""


def samples_of(request: ImageRequest) -> int:
    """Latents per call of a request: guidance above 1 draws with the text and without."""
    return 2 if request.guidance_scale > 1 else 1


def sharing_of(batching: Batching) -> Sharing:
    """A way to share an engine, by its name. Raises InputError where there is none of that name."""
    if batching == "step":
        return StepSharing()
    if batching not in BATCHINGS:
        raise InputError(f"unknown batching {batching!r}: use one of {', '.join(BATCHINGS)}")
    return GroupSharing(alone=batching == "one")


class StepSharing:
    """A new batch at every step. The keys take turns; within a key the oldest requests go first."""

    def __init__(self) -> None:
        self._served: dict[CallKey, int] = {}  # by key: when it ran last
        self._turn = 0

    def admitted(self, active: Sequence[Drawing], waiting: Iterable[Ticket], room: Room) -> list[Ticket]:
        """As many as fill a batch of every picture size, and a few ahead, whose texts are encoded meanwhile."""
        load: Counter[object] = Counter()
        for drawing in active:
            load[drawing.ticket.request.size] += 0 if drawing.denoised else drawing.samples
        begin: list[Ticket] = []
        for ticket in waiting:
            samples, size = samples_of(ticket.request), ticket.request.size
            if len(active) + len(begin) >= room.drawings:
                break
            if load[size] + samples <= room.samples + _AHEAD * samples:
                load[size] += samples
                begin.append(ticket)
        return begin

    def chosen(self, active: Sequence[Drawing], keys: Sequence[CallKey | None], room: Room) -> list[Drawing]:
        """Of the key that waits longest."""
        present = [key for key in dict.fromkeys(keys) if key is not None]
        if not present:
            return []
        key = min(present, key=lambda one: self._served.get(one, -1))
        self._turn += 1
        self._served = {one: turn for one, turn in self._served.items() if one in present} | {key: self._turn}
        return _fitting([drawing for drawing, own in zip(active, keys, strict=True) if own == key], room.samples)


@dataclass(frozen=True)
class GroupSharing:
    """Requests of one schedule from the first step to the last, or ``alone``, each by itself."""

    alone: bool

    def admitted(self, active: Sequence[Drawing], waiting: Iterable[Ticket], room: Room) -> list[Ticket]:
        """Once all who were drawn are denoised: the oldest, and those that go its way."""
        if not all(drawing.denoised for drawing in active):
            return []
        begin: list[Ticket] = []
        for ticket in waiting:
            if begin and _way(ticket.request) != _way(begin[0].request):
                continue
            if begin and (self.alone or (len(begin) + 1) * samples_of(ticket.request) > room.samples):
                break
            begin.append(ticket)
        return begin

    def chosen(self, active: Sequence[Drawing], keys: Sequence[CallKey | None], room: Room) -> list[Drawing]:
        """All of the group, once all of them wait."""
        group = [drawing for drawing in active if not drawing.denoised]
        if not all(isinstance(drawing.wants, EngineCall) for drawing in group):
            return []
        return _fitting(group, room.samples)


def _way(request: ImageRequest) -> tuple[object, ...]:
    return request.steps, request.scheduler, request.size, samples_of(request)


def _fitting(drawings: Sequence[Drawing], samples: int) -> list[Drawing]:
    """The first of them that fit into a batch; always one."""
    chosen: list[Drawing] = []
    for drawing in drawings:
        if chosen and sum(one.samples for one in chosen) + drawing.samples > samples:
            break
        chosen.append(drawing)
    return chosen
