from __future__ import annotations

import pytest

from s2p_deploy.serve.inbox import Inbox
from s2p_deploy.serve.request import ClosingError, ImageRequest, OverloadedError
from s2p_deploy.serve.ticket import Ticket


def ticket(name: str) -> Ticket:
    return Ticket(name, ImageRequest("a red circle", steps=4, guidance_scale=1.0, seed=0), taken=0.0, deadline=60.0)


def full(waiting: tuple[Ticket, ...]) -> Exception | None:
    """Why a queue with one place takes no more."""
    return OverloadedError(len(waiting), retry_after=1) if waiting else None


def test_what_was_given_up_takes_nobodys_place_before_the_drawing_thread_ends_it() -> None:
    inbox, first, second = Inbox(), ticket("first"), ticket("second")
    inbox.put(first, full)
    with pytest.raises(OverloadedError):
        inbox.put(second, full)
    first.cancel()
    assert inbox.waiting == 0
    inbox.put(second, full)
    assert inbox.waiting == 1
    assert inbox.tickets() == (first, second), "the first has yet to be told"


def test_nothing_is_taken_once_it_closes() -> None:
    inbox = Inbox()
    inbox.refuse()
    with pytest.raises(ClosingError):
        inbox.put(ticket("late"), full)
