from __future__ import annotations

from dataclasses import replace
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from s2p_deploy.pipeline import Schedule
from s2p_deploy.recipe import Gates
from s2p_deploy.records import GateResult, Number, Skipped
from s2p_deploy.validation import junit_xml
from s2p_deploy.validation.gates import judge, module_limit, verdict_of
from s2p_deploy.validation.measurements import (
    NOT_CUT,
    BlockAgreement,
    BlockError,
    EndToEnd,
    LayerAgreement,
    Measurements,
    Perceptual,
    PictureComparison,
    QuantizerCodes,
    Similarity,
    TableGap,
)

GATES = Gates(median_psnr=30.0, attribute_accuracy_drop=0.05)
GPU = Skipped("needs a GPU")


def similarity(psnr: float) -> Similarity:
    return Similarity(np.full(4, psnr), np.ones(4), np.ones(4))


def end_to_end(change: float) -> EndToEnd:
    level = np.full(64, 40.0)
    return EndToEnd(np.arange(64), level, level + change, level + 5, level, 0.0, guidance=np.full(32, 20.0))


def room(*of: float) -> EndToEnd:
    """Errors of its own that are so many dB below quantization's, latent by latent."""
    level = np.full(len(of), 30.0)
    indices = np.repeat(np.arange(len(of) // 2) * 100, 2)
    return EndToEnd(indices, level, level, level + np.asarray(of), level, 0.0, guidance=np.full(len(of) // 2, 20.0))


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
    quantizers=(QuantizerCodes("a", 0.0005, 1, 1000),),
    graph_blocks=(BlockAgreement("b", 60.0, 64), BlockAgreement("float", 120.0, 64)),
    engine_blocks=(BlockAgreement("b", 55.0, 64), BlockAgreement("float", 110.0, 64)),
    block_errors=(BlockError("b", 40.0), BlockError("float", None)),
    engine_layers=(LayerAgreement("b.conv", 60.0, 40.0, 16),),
    tables=(
        TableGap("scales", "scale table of the engine", 0.0, "b.conv, timestep index 1", 1000),
        TableGap("time", "time table of the engine", 5e-5, "timestep index 7", 1000),
    ),
    end_to_end=end_to_end(-0.1),
    pictures=pictures(),
)
GRAPH_BLOCKS, ENGINE_BLOCKS = "blocks of the graph, worst SQNR", "blocks of the engine, worst SQNR"
LAYERS = "layers of the engine, worst SQNR"
OWN_BRANCH, OWN_LATENT = "error of its own, worse CFG branch", "error of its own, worst latent"
GUIDANCE = "guidance, engine against fake-quant, median SQNR"


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
        ({"quantizers": (QuantizerCodes("a", 0.0011, 1, 1000),)}, "codes that differ, worst activation quantizer"),
        ({"quantizers": (QuantizerCodes("a", 0.0, 2, 1000),)}, "largest code difference"),
        ({"graph_blocks": (BlockAgreement("b", 45.9, 64),)}, GRAPH_BLOCKS),
        ({"engine_blocks": (BlockAgreement("b", 45.9, 64),)}, ENGINE_BLOCKS),
        ({"engine_blocks": (BlockAgreement("float", 49.9, 64),)}, ENGINE_BLOCKS),
        ({"engine_layers": (LayerAgreement("b.conv", 49.9, 40.0, 16),)}, LAYERS),
        ({"tables": (TableGap("scales", "scale table", 2e-6, "b.conv, timestep index 1", 9),)}, "scale table"),
        ({"tables": (TableGap("time", "time table", 2e-4, "timestep index 1", 9),)}, "time table"),
        ({"tables": (TableGap("time", "time table", 3e-3, "timestep index 1", 9, half=True),)}, "time table"),
        ({"end_to_end": room(9, -4, 9, -4)}, OWN_BRANCH),
        ({"end_to_end": room(9, 9, 9, -7, 9, 9)}, OWN_LATENT),
        ({"end_to_end": replace(end_to_end(0.0), guidance=np.full(32, 2.9))}, GUIDANCE),
        ({"end_to_end": end_to_end(-0.21)}, "SQNR to FP, engine less fake-quant"),
        ({"end_to_end": end_to_end(0.21)}, "SQNR to FP, engine less fake-quant"),
        ({"pictures": pictures(psnr=29.9)}, "pictures, median PSNR"),
        ({"pictures": pictures(accuracy=0.84)}, "attribute accuracy lost"),
    ],
)
def test_each_gate_fails_alone(changes: dict[str, Any], name: str) -> None:
    assert failed(**changes) == [name]


PSNRS = np.array([20.0, 30.0, 31.0, 32.0, 33.0, 34.0, 35.0, 36.0, 37.0, 38.0, 39.0])  # 10th percentile 30, median 34
LPIPS = np.array([0.9, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.01, 0.0])  # nine of ten below 0.5, median 0.2


@pytest.mark.parametrize(
    ("gate", "name", "value"),
    [
        ("median_psnr", "pictures, median PSNR", 34.0),
        ("p10_psnr", "pictures, 10th percentile of PSNR", 30.0),
        ("worst_psnr", "pictures, worst PSNR", 20.0),
        ("median_ssim", "pictures, median SSIM", 0.34),
        ("p10_ssim", "pictures, 10th percentile of SSIM", 0.30),
        ("worst_ssim", "pictures, worst SSIM", 0.20),
        ("median_lpips", "pictures, median LPIPS", 0.2),
        ("p10_lpips", "pictures, 10th percentile of LPIPS", 0.5),
        ("worst_lpips", "pictures, worst LPIPS", 0.9),
    ],
)
def test_a_statistic_of_the_pictures_has_a_gate_of_its_own(gate: str, name: str, value: float) -> None:
    skipped = Skipped("no weights")
    found = replace(
        GOOD,
        pictures=replace(pictures(), similarity=Similarity(PSNRS, PSNRS / 100, np.ones(11))),
        perceptual=Perceptual(LPIPS, skipped, skipped, skipped, skipped),
    )
    worse = -0.001 if gate.endswith("lpips") else 0.001
    for limit, status in ((value, "passed"), (value + worse, "failed")):
        gates = Gates().model_copy(update={gate: limit + (1e-9 if worse < 0 else -1e-9)})
        results = {result.name: result for result in judge(found, gates)}
        assert results[name].status == status
        assert results[name].value == pytest.approx(value)
        assert sum(other.startswith("pictures, ") for other in results) == 2 + (gate != "median_psnr")
    unmeasured = replace(found, pictures=GPU, perceptual=GPU)
    assert {r.name: r.status for r in judge(unmeasured, gates)}[name] == "not measured"


def test_pictures_no_better_than_a_shift_by_a_pixel_fail() -> None:
    assert "pictures, median PSNR above a one-pixel shift" in failed(pictures=pictures(psnr=24.9))


@pytest.mark.parametrize(
    "changes",
    [
        {"quantizers": (QuantizerCodes("a", float("nan"), 1, 1000),)},
        {"graph_blocks": (BlockAgreement("b", float("nan"), 64), BlockAgreement("c", 60.0, 64))},
        {"engine_half": True, "engine_blocks": (BlockAgreement("b", float("nan"), 64),)},
        {"engine_layers": (LayerAgreement("b.conv", float("nan"), 40.0, 16),)},
        {"tables": (TableGap("time", "time table", float("nan"), "shape [1, 2]", 9),)},
        {"end_to_end": room(float("nan"), 9, 9, 9)},
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
    half = {"engine_half": True, "engine_blocks": (BlockAgreement("b", 42.0, 64), BlockAgreement("float", 41.0, 64))}
    assert failed(**half, end_to_end=end_to_end(-0.29)) == []
    assert failed(**half, end_to_end=end_to_end(-0.31)) == ["SQNR to FP, engine less fake-quant"]
    assert failed(engine_half=True, engine_blocks=(BlockAgreement("b", 39.9, 64),)) == [ENGINE_BLOCKS]
    low = (BlockError("b", 20.0),)  # 4-bit weights: half precision need not be exact to be right
    assert failed(engine_half=True, engine_blocks=(BlockAgreement("b", 26.1, 64),), block_errors=low) == []
    assert failed(graph_half=True, quantizers=(QuantizerCodes("a", 0.019, 1, 1000),)) == []


def test_a_float32_graph_has_the_references_own_arithmetic() -> None:
    """However much quantization costs a block, its graph form does the same steps."""
    low = (BlockError("b", 20.0),)
    right, wrong = ((BlockAgreement("b", value, 64),) for value in (50.1, 49.9))
    assert failed(graph_blocks=right, block_errors=low) == []
    assert failed(graph_blocks=wrong, block_errors=low) == [GRAPH_BLOCKS]
    assert failed(graph_blocks=wrong, block_errors=low, graph_half=True) == []
    assert failed(engine_blocks=wrong, block_errors=low) == []


def test_a_part_is_judged_by_what_quantization_costs_it() -> None:
    assert module_limit(20.0, 10.0, GATES, half=False) == 30.0
    assert module_limit(54.0, 10.0, GATES, half=False) == 64.0
    assert module_limit(None, 10.0, GATES, half=False) == 50.0
    assert module_limit(20.0, 10.0, GATES, half=True) == 30.0
    assert module_limit(54.0, 10.0, GATES, half=True) == module_limit(None, 10.0, GATES, half=True) == 40.0


def test_what_failed_is_named() -> None:
    found = results(
        quantizers=(QuantizerCodes("right", 0.0, 0, 9), QuantizerCodes("wrong", 0.5, 30, 9)),
        engine_blocks=(BlockAgreement("b", 45.0, 64), BlockAgreement("float", 51.0, 64)),
        engine_layers=(LayerAgreement("b.conv1", 99.0, 40.0, 16), LayerAgreement("b.conv2", 49.0, 45.0, 16)),
        end_to_end=room(9, 9, 9, -20, 9, 9),
    )
    assert found["codes that differ, worst activation quantizer"].where == "wrong"
    assert found["largest code difference"].where == "wrong"
    assert found[ENGINE_BLOCKS].where == "b"
    assert found[LAYERS].where == "b.conv2"
    assert found[OWN_LATENT].where == "timestep index 100, text of the prompt"
    assert found["time table of the engine"].where == "timestep index 7"


def test_files_that_cannot_be_cut_leave_the_layers_out() -> None:
    found = results(engine_layers=NOT_CUT)
    assert found[LAYERS].status == "not applicable"
    assert verdict_of(found.values()) == "passed"


def test_what_could_not_be_measured_is_never_a_pass() -> None:
    found = results(engine_blocks=GPU, end_to_end=GPU, pictures=GPU)
    waiting = {name for name, result in found.items() if result.status == "not measured"}
    assert len(waiting) == 8
    assert {found[name].reason for name in waiting} == {"needs a GPU"}
    assert verdict_of(found.values()) == "not verified"
    assert verdict_of(results(pictures=GPU, graph_blocks=(BlockAgreement("b", 1.0, 64),)).values()) == "failed"


def test_the_baseline_is_not_asked_about_quantizers() -> None:
    found = results(quantized=False, quantizers=(), end_to_end=end_to_end(-3.0))
    assert found["SQNR to FP, engine less fake-quant"].status == "not applicable"
    assert found["largest code difference"].status == "not applicable"
    assert {found[name].status for name in (OWN_BRANCH, OWN_LATENT)} == {"not applicable"}
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


RESULTS = (
    GateResult("good", "dB at least", 51.5, 50.0, 64, "passed"),
    GateResult("bad", "dB at least", 12.0, 50.0, 64, "failed"),
    GateResult("nothing", "dB at least", None, 50.0, 0, "not measured", "needs a GPU"),
    GateResult("off", "dB at least", None, None, 0, "not applicable", "switched off in the recipe"),
)


def test_every_gate_is_a_case_with_its_outcome() -> None:
    suite = ET.fromstring(junit_xml(RESULTS, "engine")).find("testsuite")
    assert suite is not None
    assert {"tests": "4", "failures": "1", "errors": "1", "skipped": "1"}.items() <= suite.attrib.items()
    assert [case.get("name") for case in suite] == ["good", "bad", "nothing", "off"]
    assert [case[0].tag for case in suite] == ["system-out", "failure", "error", "skipped"]
    assert suite[0][0].text == "found 51.5 (n = 64), asks dB at least 50"
    assert suite[1][0].get("message") == "found 12 (n = 64), asks dB at least 50"
    assert suite[2][0].get("message") == "found nothing, asks dB at least 50: needs a GPU"


def test_hostile_text_stays_text() -> None:
    name = "]]></testcase><failure/>&lt;\x00\x1b[31m\ud800\uffff\"'ü"
    suite = ET.fromstring(junit_xml((GateResult(name, "x", None, None, 0, "failed", name),), name)).find("testsuite")
    assert suite is not None
    clean = "]]></testcase><failure/>&lt;\ufffd\ufffd[31m\ufffd\ufffd\"'ü"
    assert suite.get("name") == clean
    assert suite[0].get("name") == clean
    assert len(suite) == len(suite[0]) == 1
    junit_xml((GateResult(name, "x", None, None, 0, "failed", name),), name).encode("utf-8")


def test_where_nothing_is_guided_no_branches_are_compared() -> None:
    """The median of all latents counts: by halves, as of pairs, the first would fail."""
    alone = replace(room(-9, 9, 9, 9, 9, -5), guidance=np.zeros(0))
    found = results(end_to_end=alone)
    assert found[GUIDANCE].status == "not applicable"
    assert "with the prompt alone" in found[GUIDANCE].reason
    assert (found[OWN_BRANCH].status, found[OWN_BRANCH].value, found[OWN_BRANCH].n) == ("passed", 9.0, 6)
    assert found[OWN_BRANCH].where == "text of the prompt"
