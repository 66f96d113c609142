"""What cannot work is refused before it starts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from s2p_deploy.engines import Limits, backend_names, build_engine
from s2p_deploy.engines.build import BASE_MEMORY, Estimate, check_resources, estimate
from s2p_deploy.errors import InputError, MissingEnvironmentError
from tests.engines.conftest import GraphOf

HUGE = 2**60


@pytest.mark.parametrize("backend", backend_names())
def test_the_estimate_grows_with_the_weights(graph_of: GraphOf, tmp_path: Path, backend: str) -> None:
    graph = graph_of("fp32", "int8")
    weights = sum(path.stat().st_size for path in graph.folder.glob("denoiser.onnx*"))
    found = estimate(graph, backend)
    assert (found.memory, found.disk) == (BASE_MEMORY + int(1.5 * weights), 2 * weights)
    assert found.likely_memory > found.memory
    shutil.copytree(graph.folder, tmp_path / "larger")
    with (tmp_path / "larger" / "denoiser.onnx.data").open("ab") as data:
        data.truncate(10**9)  # takes no room
    larger = estimate(replace(graph, folder=tmp_path / "larger"), backend)
    assert larger.likely_memory > found.likely_memory + 10**9
    assert larger.likely_seconds > found.likely_seconds
    assert "GB of memory" in str(larger)


@pytest.mark.parametrize(
    ("needed", "word"), [(Estimate(HUGE, 0, HUGE, 0.0), "of memory"), (Estimate(0, HUGE, 0, 0.0), "of disk")]
)
def test_a_machine_that_is_too_small_is_told_so(needed: Estimate, word: str, tmp_path: Path) -> None:
    with pytest.raises(MissingEnvironmentError, match=word):
        check_resources(needed, tmp_path / "not" / "yet", None)


def test_enough_passes(tmp_path: Path) -> None:
    check_resources(Estimate(1, 1, 1, 1.0), tmp_path, 2)  # raises where there is not enough
    assert list(tmp_path.iterdir()) == []


def test_a_memory_limit_below_the_least_is_refused(graph_of: GraphOf, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too small"):
        build_engine(graph_of("fp32", "int8"), tmp_path / "out", backend="onnxruntime", limits=Limits(60, 2**20))
    assert list(tmp_path.iterdir()) == []
