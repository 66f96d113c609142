"""Runners of a plan, on GPUs and a library that stand in: the GPU that was asked for, memory, and what is freed."""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from s2p_deploy.engines.tensorrt.plan import PlanMemory, check_validity, inspect_plan, open_plan
from s2p_deploy.engines.tensorrt.runner import TensorRtRunner
from s2p_deploy.errors import MissingEnvironmentError
from tests.engines.stand_in_gpu import BYTES_PER_SAMPLE, StandInGpus, stand_in_gpus, stand_in_library

if TYPE_CHECKING:
    from types import ModuleType

BOTH = pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
SCALES = {"act_scales": np.ones((2, 3), np.float16)}
SHAPES = {"sample": ((1, 4), (2, 4), (32, 4))}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> StandInGpus:
    return stand_in_gpus(monkeypatch)


def opened(name: str, gpus: StandInGpus, monkeypatch: pytest.MonkeyPatch, index: int = 1) -> TensorRtRunner:
    monkeypatch.setitem(sys.modules, name, stand_in_library(name, gpus))
    return TensorRtRunner(open_plan(name, b"plan", torch.device("cuda", index)), SCALES)


def step(runner: TensorRtRunner, batch: int) -> torch.Tensor:
    return runner.infer_tensors({"sample": torch.ones((batch, 4), dtype=torch.float16)})["noise_pred"]


@BOTH
@pytest.mark.parametrize("index", [0, 1])
def test_everything_is_made_and_run_on_the_gpu_that_was_asked_for(
    gpus: StandInGpus, monkeypatch: pytest.MonkeyPatch, name: str, index: int
) -> None:
    runner = opened(name, gpus, monkeypatch, index)
    for batch in (2, 2, 2, 3):
        assert step(runner, batch).shape == (batch, 4)
    runner.close()
    kinds = {"engine", "tensor", "stream", "context", "step"} | ({"replay"} if name == "tensorrt" else set())
    assert {kind for kind, _ in gpus.made} == kinds
    assert {made_on for _, made_on in gpus.made} == {index}
    assert gpus.current == 0


@BOTH
def test_a_profiles_largest_batch_costs_nothing_before_it_is_run(
    gpus: StandInGpus, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    runner = opened(name, gpus, monkeypatch)
    assert gpus.sizes == []
    for batch in (2, 1, 2, 8, 2, 8):
        step(runner, batch)
    assert gpus.sizes == [2 * BYTES_PER_SAMPLE, 8 * BYTES_PER_SAMPLE]


def test_graphs_that_were_captured_in_memory_that_is_gone_are_not_replayed(
    gpus: StandInGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = opened("tensorrt", gpus, monkeypatch)
    for batch in (2, 2, 2, 8, 2):
        step(runner, batch)
    _, *ran = [kind for kind, _ in gpus.made if kind in {"step", "replay", "context"}]  # the first infers shapes
    # run, captured, replayed, replayed; a larger step; and the first again from the start
    assert ran == ["context", "step", "step", "replay", "replay", "context", "step", "context", "step"]


@BOTH
def test_a_step_for_which_there_is_no_memory_says_so(
    gpus: StandInGpus, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    runner = opened(name, gpus, monkeypatch)
    step(runner, 2)
    gpus.room = 4 * BYTES_PER_SAMPLE
    with pytest.raises(MissingEnvironmentError, match=r"needs 0\.00 GiB of memory on cuda:1.*run smaller batches"):
        step(runner, 8)
    assert step(runner, 2).shape == (2, 4)


@BOTH
def test_closing_frees_the_engine_the_contexts_and_the_memory(
    gpus: StandInGpus, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, stand_in_library(name, gpus))
    plan = open_plan(name, b"plan", torch.device("cuda", 1))
    kept: list[weakref.ref[object]] = [weakref.ref(plan.engine)]
    made = gpus.tensor

    def tensor(*shape: object, **options: object) -> torch.Tensor:
        tensor = made(*shape, **options)  # type: ignore[arg-type]
        kept.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch, "zeros", tensor)
    monkeypatch.setattr(torch, "empty", tensor)
    runner = TensorRtRunner(plan, SCALES)
    del plan
    step(runner, 2)
    assert len(kept) == 5
    assert all(reference() is not None for reference in kept)
    runner.close()
    runner.close()
    gc.collect()
    assert [reference() for reference in kept] == [None] * 5
    with pytest.raises(ValueError, match="closed"):
        step(runner, 2)


@BOTH
def test_the_memory_that_a_plan_takes_is_told(
    gpus: StandInGpus, monkeypatch: pytest.MonkeyPatch, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "s2p_deploy"):
        opened(name, gpus, monkeypatch)
    assert "memory on cuda:1: weights 0.00 GiB, a step of the largest 0.00 GiB" in caplog.text
    library = stand_in_library(name, gpus)
    assert inspect_plan(library, b"plan", SHAPES).memory == PlanMemory(5 * 2**20, 2000, 32_000)
    library.__dict__.pop("EngineStat")  # an older one
    assert inspect_plan(library, b"plan", SHAPES).memory.weights is None


def invalid(library: ModuleType, validity: str, diagnostics: int) -> None:
    library.__dict__["Runtime"] = None
    runtime = type("Runtime", (), {"get_engine_validity": lambda _self, _plan: (validity, diagnostics)})()
    check_validity(library, runtime, b"plan")


@pytest.mark.parametrize(
    ("diagnostics", "reason"),
    [
        (1, "another version of the library made it: build it again with this one"),
        (2, "it is not for this GPU's compute capability: build it for that one"),
        (4, "the GPU's driver is too old for it: install a newer one"),
        (16, "it needs more memory than the GPU has: free some, or build with a smaller --batch"),
        (3, "made it: build it again with this one; it is not for this GPU's"),
    ],
)
def test_what_the_library_says_of_a_plan_is_one_line(diagnostics: int, reason: str) -> None:
    library = stand_in_library("tensorrt_rtx", StandInGpus())
    with pytest.raises(MissingEnvironmentError, match="tensorrt_rtx cannot open this engine here: ") as caught:
        invalid(library, "invalid", diagnostics)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_that_may_be_slow_here_is_opened_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    library = stand_in_library("tensorrt_rtx", StandInGpus())
    invalid(library, "valid", 0)
    assert caplog.text == ""
    invalid(library, "suboptimal", 4)
    assert "may be slow here: the GPU's driver is too old" in caplog.text


def test_every_diagnostic_of_the_installed_library_has_its_line() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    for bit in rtx.EngineInvalidityDiagnostics.__members__.values():
        runtime = type("R", (), {"get_engine_validity": lambda _s, _p, b=bit: (rtx.EngineValidity.INVALID, b.value)})()
        with pytest.raises(MissingEnvironmentError, match=r"cannot open this engine here: \w"):
            check_validity(rtx, runtime, b"plan")


@BOTH
def test_a_plan_that_does_not_open_here_says_so(gpus: StandInGpus, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    library = stand_in_library(name, gpus, deserialize_cuda_engine=lambda _plan: None)
    monkeypatch.setitem(sys.modules, name, library)
    with pytest.raises(MissingEnvironmentError, match=f"{name} cannot open this engine on this GPU"):
        open_plan(name, b"plan", torch.device("cuda", 0))
    with pytest.raises(MissingEnvironmentError, match="cannot open"):
        inspect_plan(library, b"plan", SHAPES)
