"""What cannot work is refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2p_deploy.engines import Limits, build_engine
from s2p_deploy.engines.preflight import BASE_MEMORY, Estimate, check_resources, estimate
from s2p_deploy.errors import InputError, MissingEnvironmentError
from tests.engines.conftest import GraphOf

HUGE = 2**60


def test_the_estimate_grows_with_the_weights(graph_of: GraphOf) -> None:
    graph = graph_of("fp32", "int8")
    weights = sum(path.stat().st_size for path in graph.folder.glob("denoiser.onnx*"))
    assert estimate(graph) == Estimate(BASE_MEMORY + int(1.5 * weights), 2 * weights)


@pytest.mark.parametrize(
    ("needed", "word"), [(Estimate(memory=HUGE, disk=0), "of memory"), (Estimate(memory=0, disk=HUGE), "of disk")]
)
def test_a_machine_that_is_too_small_is_told_so(needed: Estimate, word: str, tmp_path: Path) -> None:
    with pytest.raises(MissingEnvironmentError, match=word):
        check_resources(needed, tmp_path / "not" / "yet", None)


def test_enough_passes(tmp_path: Path) -> None:
    check_resources(Estimate(1, 1), tmp_path, 2)  # raises where there is not enough
    assert list(tmp_path.iterdir()) == []


def test_a_memory_limit_below_the_least_is_refused(graph_of: GraphOf, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too small"):
        build_engine(graph_of("fp32", "int8"), "onnxruntime", tmp_path / "out", limits=Limits(60, 2**20))
    assert list(tmp_path.iterdir()) == []
