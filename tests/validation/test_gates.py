from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from s2p_deploy.pipeline import Schedule
from s2p_deploy.recipe import Gates
from s2p_deploy.records import GateResult
from s2p_deploy.validation.gates import judge, verdict_of
from s2p_deploy.validation.measurements import (
    BlockAgreement,
    EndToEnd,
    Measurements,
    PictureComparison,
    PointCodes,
    Similarity,
)
from s2p_deploy.validation.numbers import Number, Skipped

GATES = Gates(median_psnr=30.0, attribute_accuracy_drop=0.05)
GPU = Skipped("needs a GPU")


def similarity(psnr: float) -> Similarity:
    return Similarity(np.full(4, psnr), np.ones(4), np.ones(4))


def end_to_end(change: float) -> EndToEnd:
    level = np.full(64, 40.0)
    return EndToEnd(np.arange(64), level, level + change, level, level, 0.0)


def pictures(psnr: float = 35.0, accuracy: float = 0.9) -> PictureComparison:
    return PictureComparison(
        schedule=Schedule(2),
        guidance_scale=2.5,
        similarity=similarity(psnr),
        pixel_shift=similarity(25.0),
        timesteps=(501.0, 1.0),
        step_error=np.zeros((2, 4)),
        accuracy=(Number(0.9, 4), Number(accuracy, 4)),
        feature_distance=Skipped("none"),
        seconds=(1.0, 1.0),
    )


GOOD = Measurements(
    quantized=True,
    graph_half=False,
    engine_half=False,
    points=(PointCodes("a", 0.0005, 1, 1000),),
    graph_blocks=(BlockAgreement("b", 60.0, 64),),
    engine_blocks=(BlockAgreement("b", 55.0, 64),),
    end_to_end=end_to_end(-0.1),
    pictures=pictures(),
)


def results(**changes: object) -> dict[str, GateResult]:
    return {result.name: result for result in judge(replace(GOOD, **changes), GATES)}


def failed(**changes: object) -> list[str]:
    return [name for name, result in results(**changes).items() if result.status == "failed"]


def test_a_good_engine_passes_every_gate() -> None:
    assert {result.status for result in results().values()} == {"passed"}
    assert verdict_of(judge(GOOD, GATES)) == "passed"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"points": (PointCodes("a", 0.0011, 1, 1000),)}, "codes that differ, worst act point"),
        ({"points": (PointCodes("a", 0.0, 2, 1000),)}, "largest code difference"),
        ({"graph_blocks": (BlockAgreement("b", 49.9, 64),)}, "blocks of the graph, worst SQNR"),
        ({"engine_blocks": (BlockAgreement("b", 49.9, 64),)}, "blocks of the engine, worst SQNR"),
        ({"end_to_end": end_to_end(-0.21)}, "SQNR to FP, engine less fake-quant"),
        ({"end_to_end": end_to_end(0.21)}, "SQNR to FP, engine less fake-quant"),
        ({"pictures": pictures(psnr=29.9)}, "pictures, median PSNR"),
        ({"pictures": pictures(accuracy=0.84)}, "attribute accuracy lost"),
    ],
)
def test_each_gate_fails_alone(changes: dict[str, Any], name: str) -> None:
    assert failed(**changes) == [name]


def test_pictures_no_better_than_a_shift_by_a_pixel_fail() -> None:
    assert "pictures, median PSNR above a one-pixel shift" in failed(pictures=pictures(psnr=24.9))


@pytest.mark.parametrize(
    "changes",
    [
        {"points": (PointCodes("a", float("nan"), 1, 1000),)},
        {"graph_blocks": (BlockAgreement("b", float("nan"), 64), BlockAgreement("c", 60.0, 64))},
        {"end_to_end": end_to_end(float("nan"))},
        {"pictures": pictures(psnr=float("nan"))},
        {"pictures": pictures(accuracy=float("nan"))},
        {"pictures": pictures(psnr=float("inf"))},
    ],
)
def test_what_is_not_a_number_never_passes(changes: dict[str, Any]) -> None:
    assert failed(**changes)
    assert verdict_of(results(**changes).values()) == "failed"


def test_half_precision_has_its_own_limits() -> None:
    half = {"engine_half": True, "engine_blocks": (BlockAgreement("b", 42.0, 64),)}
    assert failed(**half, end_to_end=end_to_end(-0.29)) == []
    assert failed(**half, end_to_end=end_to_end(-0.31)) == ["SQNR to FP, engine less fake-quant"]
    assert results(**half)["blocks of the engine, worst SQNR"].status == "not applicable"
    assert failed(graph_half=True, points=(PointCodes("a", 0.019, 1, 1000),)) == []


def test_what_could_not_be_measured_is_never_a_pass() -> None:
    found = results(engine_blocks=GPU, end_to_end=GPU, pictures=GPU)
    waiting = {name for name, result in found.items() if result.status == "not measured"}
    assert len(waiting) == 5
    assert {found[name].reason for name in waiting} == {"needs a GPU"}
    assert verdict_of(found.values()) == "not verified"
    assert verdict_of(results(pictures=GPU, graph_blocks=(BlockAgreement("b", 1.0, 64),)).values()) == "failed"


def test_the_baseline_is_not_asked_about_quantizers() -> None:
    found = results(quantized=False, points=(), end_to_end=end_to_end(-3.0))
    assert found["SQNR to FP, engine less fake-quant"].status == "not applicable"
    assert found["largest code difference"].status == "not applicable"
    assert verdict_of(found.values()) == "passed"


def test_prompts_that_are_no_captions_have_no_accuracy() -> None:
    found = results(pictures=replace(pictures(), accuracy=Skipped("no captions")))
    assert found["attribute accuracy lost"].status == "not applicable"
    assert found["attribute accuracy lost"].reason == "no captions"


def test_gates_that_are_off_say_so_and_nothing_at_all_is_no_pass() -> None:
    off = Gates(median_psnr=None, beats_pixel_shift=False, attribute_accuracy_drop=None)
    found = [result for result in judge(GOOD, off) if result.status == "not applicable"]
    assert {result.reason for result in found} == {"switched off in the recipe"}
    assert len(found) == 3
    assert verdict_of(found) == "not verified"
