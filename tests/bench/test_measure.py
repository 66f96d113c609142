"""The measurement on real engines, each in its own process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from s2p_deploy.bench.measure import Load, bench, gain_limits, int8_share, ratio_of_medians, with_gates
from s2p_deploy.bench.result import BenchResult
from s2p_deploy.context import Context
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families import BasePipeline
from s2p_deploy.recipe import Bench
from s2p_deploy.records import Base, Engine
from tests.named_engines import NamedEngines

QUICK = Load(batch=3, rounds=2, pictures=0)


@pytest.fixture(scope="module")
def measured(engine_of: NamedEngines) -> BenchResult:
    return bench([engine_of("w8a8", "full")], engine_of("fp", "full"), QUICK)


def test_every_figure_says_how_many_samples_it_has(measured: BenchResult) -> None:
    (engine,) = measured.engines
    for figures in (measured.baseline, engine):
        assert figures.step_p50.n == figures.step_p95.n == 2 * measured.steps_per_round
        assert 0 < figures.step_p50.value <= figures.step_p95.value
        assert figures.load_seconds > figures.step_p50.value
    assert engine.ratios is not None
    assert engine.ratios.step.value == pytest.approx(engine.step_p50.value / measured.baseline.step_p50.value)
    assert engine.ratios.load == pytest.approx(engine.load_seconds / measured.baseline.load_seconds)
    assert measured.baseline.ratios is None


def test_memory_is_that_of_the_engines_own_process(measured: BenchResult) -> None:
    for figures in (measured.baseline, *measured.engines):
        memory = figures.memory
        assert 10_000_000 < memory.before < 200_000_000, "the process holds little besides the engine"
        assert memory.before < memory.loaded <= memory.peak
        assert memory.before < memory.steady <= memory.peak


def test_sizes_are_those_on_disk(measured: BenchResult, engine_of: NamedEngines) -> None:
    (engine,) = measured.engines
    assert engine.ratios is not None
    folder = engine_of("w8a8", "full").folder
    assert engine.size == sum(file.stat().st_size for file in folder.iterdir() if file.name != "manifest.json")
    assert engine.ratios.size == pytest.approx(engine.size / measured.baseline.size)


def test_no_pictures_were_asked_for(measured: BenchResult) -> None:
    assert measured.pictures == 0
    assert measured.baseline.images_per_minute is None


def test_the_result_is_json_without_this_machines_paths(measured: BenchResult, engine_of: NamedEngines) -> None:
    text = measured.model_dump_json()
    assert BenchResult.model_validate_json(text) == measured
    assert json.loads(text)["kind"] == "Bench"
    assert str(engine_of("fp", "full").folder.parent) not in text
    assert measured.machine.cores >= 1
    assert {"onnxruntime", "python"} <= set(measured.machine.versions)


@pytest.mark.slow
def test_pictures_go_from_text_to_pixels(drawing_engine: Engine, drawing_base: BasePipeline) -> None:
    told: list[tuple[str, int, int]] = []
    found = bench(
        [drawing_engine],
        drawing_engine,
        Load(rounds=1, pictures=2),
        base=drawing_base,
        context=Context(progress=lambda stage, done, total: told.append((stage, done, total))),
    )
    (engine,) = found.engines
    assert (found.pictures, found.sampling_steps) == (2, 2)
    assert engine.picture_seconds is not None
    assert engine.picture_seconds.n == 2
    assert engine.picture_seconds.value > 2 * engine.step_p50.value
    assert engine.images_per_minute == pytest.approx(60 / engine.picture_seconds.value)
    assert engine.ratios is not None
    assert engine.ratios.images_per_minute is not None
    assert [told[i] for i in (0, -1)] == [("load", 0, 2), ("draw pictures", 4, 4)]


def test_a_baseline_of_another_optimization_is_refused(engine_of: NamedEngines) -> None:
    with pytest.raises(InputError, match=r"optimization full.*optimization reference"):
        bench([engine_of("w8a8", "full")], engine_of("fp", "reference"), QUICK)


def test_a_quantized_baseline_is_refused(engine_of: NamedEngines) -> None:
    with pytest.raises(InputError, match="recipe w8a8: give an engine of recipe fp"):
        bench([engine_of("fp", "full")], engine_of("w8a8", "full"), QUICK)


def test_another_pipelines_baseline_is_refused(engine_of: NamedEngines) -> None:
    fp = engine_of("fp", "full")
    other = dataclasses.replace(fp, manifest=dataclasses.replace(fp.manifest, base=Base("other", "1" * 64)))
    with pytest.raises(InputError, match="different pipelines"):
        bench([engine_of("w8a8", "full")], other, QUICK)


def test_a_changed_engine_is_refused_by_its_process(engine_of: NamedEngines, tmp_path: Path) -> None:
    fp = engine_of("fp", "full")
    shutil.copytree(fp.folder, tmp_path / "changed")
    file = tmp_path / "changed" / fp.engine_files[0]
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError, match="changed"):
        bench([fp], dataclasses.replace(fp, folder=tmp_path / "changed"), QUICK)


def test_the_ratio_is_that_of_the_medians() -> None:
    own, reference = np.asarray([[1.0, 2.0], [3.0, 100.0]]), np.asarray([[4.0, 4.0], [6.0, 6.0]])
    ratio = ratio_of_medians(own, reference)
    assert (ratio.value, ratio.n) == (pytest.approx(0.5), 4)


def test_a_machine_that_slows_down_for_all_does_not_widen_the_interval() -> None:
    slowing = np.geomspace(1.0, 10.0, 8)[:, None] * np.ones((8, 3))
    ratio = ratio_of_medians(0.7 * slowing, slowing)
    assert ratio.low == pytest.approx(0.7)
    assert ratio.high == pytest.approx(0.7)
    shuffled = ratio_of_medians(0.7 * slowing[::-1], slowing)
    assert shuffled.low is not None
    assert shuffled.low < 0.6


def test_a_gain_is_judged_at_the_worse_end_of_its_interval(measured: BenchResult) -> None:
    (engine,) = measured.engines
    assert engine.ratios is not None
    step = engine.ratios.step
    worst = 1 / (step.high or step.value)
    passed, failed = (with_gates(engine, Bench(speedup=limit)).gates[0] for limit in (worst * 0.99, worst * 1.01))
    assert (passed.passed, failed.passed) == (True, False)
    assert passed.value == pytest.approx(worst)
    assert with_gates(engine, Bench()).gates == ()


def test_the_share_in_int8_is_of_the_quantized_layers(engine_of: NamedEngines) -> None:
    engine = engine_of("w8a8", "full")
    layers = [layer for layer in engine.layers if layer.weight_storage_bits <= 8 and layer.activation_bits <= 8]
    shares = {
        compute: int8_share(SimpleNamespace(layers=[replace(layer, compute=compute) for layer in layers]))  # type: ignore[arg-type]
        for compute in ("int8", "fp32", "unknown")
    }
    assert shares == {"int8": 1.0, "fp32": 0.0, "unknown": None}
    half = [replace(layer, compute=("int8", "fp32")[number % 2]) for number, layer in enumerate(layers[:10])]
    assert int8_share(SimpleNamespace(layers=half)) == 0.5  # type: ignore[arg-type]


def test_what_cannot_be_measured_is_no_gain(measured: BenchResult) -> None:
    unknown = measured.engines[0].model_copy(update={"int8_share": None})
    assert [gate.passed for gate in with_gates(unknown, Bench(int8_share=0.5)).gates] == [False]


def test_limits_of_options_leave_the_recipes_others(engine_of: NamedEngines) -> None:
    engine = engine_of("w8a8", "full")
    recipe = engine.manifest.recipe | {"bench": {"speedup": 2.0, "int8_share": 0.5}}
    own = replace(engine, manifest=replace(engine.manifest, recipe=recipe))
    assert gain_limits(own, Bench(speedup=3.0)) == Bench(speedup=3.0, int8_share=0.5)
    assert gain_limits(own, Bench()) == Bench(speedup=2.0, int8_share=0.5)


def test_steps_that_no_engine_runs_are_refused_before_any_is_loaded(
    drawing_engine: Engine, drawing_base: BasePipeline
) -> None:
    told: list[str] = []
    context = Context(progress=lambda stage, _done, _total: told.append(stage))
    load = replace(QUICK, batch=2, pictures=1, steps=2000)
    with pytest.raises(InputError, match="cannot do 2000 steps"):
        bench([drawing_engine], drawing_engine, load, base=drawing_base, context=context)
    assert told == []
