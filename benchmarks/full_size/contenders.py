"""Contenders of one run: each in a process of its own, steps in turns, their seconds, memory and ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from s2p_deploy.bench.measure import ratio_of_medians
from s2p_deploy.bench.turns import Child, children, in_turns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STEPS_A_TURN = 2  # measured, after one that is not


class Contender(NamedTuple):
    """A name, the arguments of its child process, and what that is asked to load."""

    name: str
    worker: tuple[str, ...]
    request: Mapping[str, Any]


class Timed(NamedTuple):
    """Seconds per step of every contender [rounds, steps], and what a page shows of each."""

    seconds: dict[str, np.ndarray]
    figures: dict[str, dict[str, Any]]


def timed_in_turns(contenders: Sequence[Contender], batch: int, rounds: int) -> Timed:
    """Loads them in the given order, then lets each take its turn in every round."""
    with children([(one.name, one.worker) for one in contenders]) as loaded:
        load_s = {
            child.name: child.request("load", batch=batch, **one.request)["seconds"]
            for child, one in zip(loaded, contenders, strict=True)
        }
        answers = _turns(loaded, rounds)
    seconds = {name: np.asarray([answer["seconds"] for answer in found]) for name, found in answers.items()}
    figures = {
        name: {
            "best_s": float(found.min()),
            "median_s": float(np.median(found)),
            "steps": int(found.size),
            "load_s": load_s[name],
            "peak_memory_gb": answers[name][-1]["peak"] / 1e9,
        }
        for name, found in seconds.items()
    }
    return Timed(seconds, figures)


def step_ratio(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float | None]:
    """Of seconds per step [rounds, steps]: of the best ones, and of the medians with their interval."""
    medians = ratio_of_medians(ours, theirs)
    return {"best": float(ours.min() / theirs.min()), "median": medians.value, "low": medians.low, "high": medians.high}


def _turns(loaded: Sequence[Child], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What every child answered in each round, by name."""
    answers: dict[str, list[dict[str, Any]]] = {child.name: [] for child in loaded}

    def visit(member: int, number: int) -> None:
        child = loaded[member]
        answers[child.name].append(child.request("steps", count=STEPS_A_TURN))
        print(f"round {number + 1}/{rounds} {child.name}: {answers[child.name][-1]['seconds']}", flush=True)

    in_turns(len(loaded), rounds, visit)
    return answers
