"""Who begins and who runs next, by hand; and that no way of sharing ever starves a request (Hypothesis)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from s2p_deploy.errors import InputError
from s2p_deploy.serve.batching import BATCHINGS, Room, Sharing, samples_of, sharing_of
from s2p_deploy.serve.drawing import Drawing, EngineCall, pause
from s2p_deploy.serve.engine_batch import call_key
from s2p_deploy.serve.request import ImageRequest
from s2p_deploy.serve.ticket import Ticket

if TYPE_CHECKING:
    from s2p_deploy.serve.batching import Batching

ROOM = Room(samples=4, drawings=8)


def ticket(name: str, steps: int = 3, guidance: float = 2.0, size: tuple[int, int] | None = None) -> Ticket:
    return Ticket(name, ImageRequest("", steps, guidance, 0, size=size), taken=0.0, deadline=1.0)


def begun(one: Ticket) -> Drawing:
    """A drawing that calls the engine at once, once per step."""
    samples = samples_of(one.request)
    height, width = one.request.size or (8, 8)

    def draw() -> Image.Image:
        for step in range(one.request.steps):
            sample = np.zeros((samples, 4, height, width), np.float32)
            pause(EngineCall({"sample": sample, "step_index": np.full(samples, step)}))
        return Image.new("RGB", (8, 8))

    drawing = Drawing(one, draw, one.request.steps, samples)
    drawing.go_on()
    return drawing


@dataclass
class Engine:
    """What a service does around a way of sharing, without time: ``turn`` runs one batch and says who was in it."""

    sharing: Sharing
    waiting: list[Ticket]
    room: Room = ROOM
    active: list[Drawing] = field(default_factory=list)

    def turn(self) -> list[str]:
        begin = self.sharing.admitted(self.active, self.waiting, self.room)
        self.waiting = [one for one in self.waiting if one not in begin]
        self.active += map(begun, begin)
        keys = [
            call_key(one.wants, mixed_rows=True) if isinstance(one.wants, EngineCall) else None for one in self.active
        ]
        chosen = self.sharing.chosen(self.active, keys, self.room)
        assert len({keys[self.active.index(drawing)] for drawing in chosen}) <= 1, "one batch, one key"
        assert sum(one.samples for one in chosen) <= self.room.samples or len(chosen) == 1
        for drawing in chosen:
            drawing.go_on({})
        self.active = [drawing for drawing in self.active if drawing.picture is None]
        return [drawing.ticket.id for drawing in chosen]

    def turns(self, count: int) -> list[list[str]]:
        return [self.turn() for _ in range(count)]


def test_step_by_step_a_request_joins_those_that_are_under_way() -> None:
    engine = Engine(sharing_of("step"), [ticket("long", 3)])
    assert engine.turns(1) == [["long"]]
    engine.waiting.append(ticket("short", 1))
    assert engine.turns(2) == [["long", "short"], ["long"]]
    assert not engine.active


def test_step_by_step_a_full_batch_goes_to_the_oldest() -> None:
    engine = Engine(sharing_of("step"), [ticket(name, 2) for name in "abc"])
    assert engine.turns(4) == [["a", "b"], ["a", "b"], ["c"], ["c"]]


def test_step_by_step_guided_and_unguided_share_a_batch() -> None:
    engine = Engine(sharing_of("step"), [ticket("guided", 1), ticket("plain", 1, guidance=1.0)])
    assert engine.turns(1) == [["guided", "plain"]]


def test_step_by_step_sizes_take_turns() -> None:
    large = [ticket(f"large{i}", 2, size=(16, 16)) for i in range(2)]
    engine = Engine(sharing_of("step"), [ticket("a", 2), *large, ticket("b", 2)])
    assert engine.turns(4) == [["a", "b"], ["large0", "large1"]] * 2


def test_step_by_step_few_begin_ahead_of_their_place() -> None:
    engine = Engine(sharing_of("step"), [ticket(str(i)) for i in range(8)])
    engine.turn()
    assert [drawing.ticket.id for drawing in engine.active] == ["0", "1", "2", "3"], "two run, two are ready"


def test_no_more_begin_than_there_is_room_for() -> None:
    engine = Engine(sharing_of("step"), [ticket(str(i)) for i in range(4)], Room(samples=16, drawings=3))
    engine.turn()
    assert len(engine.active) == 3


def test_request_by_request_only_one_schedule_runs_at_a_time() -> None:
    waiting = [ticket("a", 2), ticket("other", 1), ticket("b", 2), ticket("c", 2)]
    engine = Engine(sharing_of("request"), waiting)
    assert engine.turns(5) == [["a", "b"], ["a", "b"], ["other"], ["c"], ["c"]]


def test_one_by_one() -> None:
    engine = Engine(sharing_of("one"), [ticket("a", 2), ticket("b", 1)])
    assert engine.turns(3) == [["a"], ["a"], ["b"]]


def test_engines_of_one_row_per_batch_get_calls_of_one_row() -> None:
    calls = [EngineCall({"sample": np.zeros((2, 4, 8, 8)), "step_index": np.full(2, row)}) for row in (7, 7, 9)]
    assert len({call_key(call, mixed_rows=False) for call in calls}) == 2
    assert len({call_key(call, mixed_rows=True) for call in calls}) == 1


def test_a_request_larger_than_the_largest_batch_runs_alone() -> None:
    engine = Engine(sharing_of("step"), [ticket("a", 1), ticket("b", 1)], Room(samples=1, drawings=4))
    assert engine.turns(2) == [["a"], ["b"]]


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(InputError, match="unknown batching 'all': use one of step, request, one"):
        sharing_of("all")  # type: ignore[arg-type]


@given(
    st.sampled_from(BATCHINGS),
    st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from([1.0, 2.0]), st.sampled_from([None, (16, 16), (16, 8)])),
        max_size=12,
    ),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_every_request_is_drawn_in_as_many_turns_as_there_are_steps(
    batching: Batching, wanted: list[Any], samples: int, drawings: int
) -> None:
    waiting = [ticket(str(i), *options) for i, options in enumerate(wanted)]
    engine = Engine(sharing_of(batching), list(waiting), Room(samples, drawings))
    steps = sum(one.request.steps for one in waiting)
    turns = [engine.turn() for _ in range(steps)]
    assert not engine.active
    assert not engine.waiting
    ran = [name for turn in turns for name in turn]
    assert {one.id: ran.count(one.id) for one in waiting} == {one.id: one.request.steps for one in waiting}
