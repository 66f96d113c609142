"""Child processes that answer in turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2p_deploy.bench.turns import children, in_turns
from s2p_deploy.errors import InputError, S2PError

ANSWERS = """
import os, sys
from s2p_deploy.bench.turns import answer_requests
from s2p_deploy.errors import InputError

def refuse(request):
    raise InputError("no such batch")

def fall(request):
    print("about to fall", file=sys.stderr, flush=True)
    os.kill(os.getpid(), 9)

def chatter(request):
    print("a library talks on stdout")
    return {"pid": os.getpid(), "given": request["value"]}

answer_requests({"refuse": refuse, "fall": fall, "chatter": chatter})
"""


def test_answers_come_from_the_asked_child_alone() -> None:
    with children([("one", ["-c", ANSWERS]), ("two", ["-c", ANSWERS])]) as (one, two):
        first, second, again = (
            one.request("chatter", value=1),
            two.request("chatter", value=2),
            one.request("chatter", value=3),
        )
    assert (first["given"], second["given"], again["given"]) == (1, 2, 3)
    assert first["pid"] == again["pid"] != second["pid"]


def test_none_is_left_behind_by_an_error() -> None:
    pids: list[int] = []

    def interrupted() -> None:
        with children([("one", ["-c", ANSWERS]), ("two", ["-c", ANSWERS])]) as asked:
            pids.extend(child.request("chatter", value=0)["pid"] for child in asked)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(pids) == 2
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def test_an_expected_error_keeps_its_class_and_says_whose_it_is() -> None:
    with children([("the engine", ["-c", ANSWERS])]) as (child,):
        with pytest.raises(InputError, match="the engine: no such batch"):
            child.request("refuse")
        assert child.request("chatter", value=1)["given"] == 1


def test_a_crash_is_one_error_with_the_last_words() -> None:
    with children([("the engine", ["-c", ANSWERS])]) as (child,):
        with pytest.raises(S2PError, match=r"the engine was killed, most likely.*\n.*about to fall"):
            child.request("fall")
        with pytest.raises(S2PError, match="was killed"):
            child.request("chatter", value=1)


def test_a_child_that_never_starts_is_an_error() -> None:
    with (
        children([("the engine", ["-c", "import no_such_module"])]) as (child,),
        pytest.raises(S2PError, match=r"failed: ModuleNotFoundError.*\n(.*\n)*.*no_such_module"),
    ):
        child.request("chatter", value=1)


def test_every_round_starts_with_another_member() -> None:
    visits: list[tuple[int, int]] = []
    in_turns(3, 2, lambda member, number: visits.append((number, member)))
    assert visits == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 0)]
