"""Builds: what an engine records, and what a build that fails leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from s2p_deploy.context import Context
from s2p_deploy.engines import BuildOptions, Limits, ShapeProfile, backend_by_name, backend_names, build_engine
from s2p_deploy.engines.build import compile_in_child
from s2p_deploy.errors import EngineBuildError, InputError, IntegrityError, MissingEnvironmentError
from s2p_deploy.records import Engine, ExportedGraph
from tests.engines.conftest import EngineOf, GraphOf
from tests.engines.stand_in_gpu import stand_in_gpus


def test_an_engine_records_what_it_is(engine_of: EngineOf, graph_of: GraphOf) -> None:
    engine, graph = engine_of("onnxruntime", "reference", "int4"), graph_of("fp32", "int4")
    content = engine.manifest.content
    assert engine.manifest.parents["graph"].digest == graph.manifest.digest
    assert engine.manifest.base == graph.manifest.base
    assert engine.denoiser_config == {"in_channels": 4, "sample_size": 8}
    assert engine.scales.quantizers == graph.scales.quantizers
    assert engine.inputs == graph.inputs
    assert content["profile"] == {"minimum": 1, "optimum": 2, "maximum": 32}
    assert content["sizes"] == {name: (engine.folder / name).stat().st_size for name in engine.engine_files}
    assert 0 < content["build_seconds"] < 60
    assert 2**20 < content["peak_rss_bytes"] < 2**33
    assert [(s.name, s.lowering, s.weight_storage_bits, s.activation_bits) for s in engine.layers] == [
        ("conv_in", "weight_only", 4, 32),
        ("conv", "rescale", 8, 8),
        ("to_q", "rescale", 8, 8),
        ("conv_out", "float", 32, 32),
    ]
    assert Engine.open(engine.folder).layers == engine.layers


def test_progress_is_told(graph_of: GraphOf, tmp_path: Path) -> None:
    reported: list[tuple[str, int, int]] = []
    build_engine(
        graph_of("fp32", "int8"),
        tmp_path / "e",
        backend="onnxruntime",
        context=Context(progress=lambda *step: reported.append(step)),
    )
    assert reported == [("build", 0, 1), ("build", 1, 1)]


def test_the_child_that_builds_works_on_the_gpu_that_was_asked_for(
    graph_of: GraphOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = stand_in_gpus(monkeypatch)
    monkeypatch.setattr(
        "s2p_deploy.engines.build.call_in_child", lambda _name, message, _limits: compile_in_child(message)
    )
    build_engine(graph_of("fp32", "int8"), tmp_path / "e", backend="onnxruntime", context=Context(device="cuda:1"))
    assert gpus.current == 1


@pytest.mark.parametrize(
    ("backend", "options", "error"),
    [
        ("nonsense", {}, InputError),
        ("onnxruntime", {"options": BuildOptions(optimization="nonsense")}, InputError),
        ("tensorrt_rtx", {}, (InputError, MissingEnvironmentError)),  # an fp32 graph, or no library
        ("onnxruntime", {"limits": Limits(0.01)}, EngineBuildError),
    ],
)
def test_a_build_that_fails_leaves_nothing(
    graph_of: GraphOf, tmp_path: Path, backend: str, options: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        build_engine(graph_of("fp32", "int8"), tmp_path / "out", backend=backend, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_in_the_child_is_a_build_error(
    graph_of: GraphOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the preflight's least, lowered, so that the child and not the preflight meets the limit
    monkeypatch.setattr("s2p_deploy.engines.build.BASE_MEMORY", 0)
    with pytest.raises(EngineBuildError):
        build_engine(graph_of("fp32", "int8"), tmp_path / "out", backend="onnxruntime", limits=Limits(60, 40 * 2**20))
    assert list(tmp_path.iterdir()) == []


def test_what_stands_at_out_stays_when_a_replacing_build_fails(graph_of: GraphOf, tmp_path: Path) -> None:
    graph, out = graph_of("fp32", "int8"), tmp_path / "out"
    first = build_engine(graph, out, backend="onnxruntime")
    with pytest.raises(InputError, match="exists"):
        build_engine(graph, out, backend="onnxruntime")
    with pytest.raises(EngineBuildError):
        build_engine(graph, out, backend="onnxruntime", replace=True, limits=Limits(0.01))
    assert Engine.open(out).manifest.digest == first.manifest.digest
    assert (
        build_engine(
            graph, out, backend="onnxruntime", options=BuildOptions(optimization="full"), replace=True
        ).optimization
        == "full"
    )


def killed_while_it_compiles(graph: ExportedGraph, out: Path) -> None:
    def kill(_function: str, message: dict[str, str], _limits: Limits) -> None:
        (Path(message["scratch"]) / "denoiser.onnx.data").write_bytes(b"a copy of the weights")
        os.kill(os.getpid(), signal.SIGKILL)

    with patch("s2p_deploy.engines.build.call_in_child", kill):
        build_engine(graph, out, backend="onnxruntime")


def test_what_a_killed_build_leaves_is_removed_by_the_next(graph_of: GraphOf, tmp_path: Path) -> None:
    graph, out = graph_of("fp32", "int8"), tmp_path / "out"
    child = multiprocessing.get_context("fork").Process(target=killed_while_it_compiles, args=(graph, out))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert list(tmp_path.rglob("denoiser.onnx.data")), "the kill must hit it in the middle"
    made = build_engine(graph, out, backend="onnxruntime")
    assert Engine.open(out).manifest == made.manifest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_graph_that_changed_after_it_was_opened_is_refused(graph_of: GraphOf, tmp_path: Path) -> None:
    import shutil

    graph = graph_of("fp32", "int8")
    copy = tmp_path / "graph"
    shutil.copytree(graph.folder, copy)
    data = copy / "denoiser.onnx.data"
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(IntegrityError, match="changed"):
        build_engine(replace(graph, folder=copy), tmp_path / "out", backend="onnxruntime")
    assert not (tmp_path / "out").exists()


def test_every_backend_says_what_it_can_do() -> None:
    for name in backend_names():
        found = backend_by_name(name).capabilities()
        assert found.backend == name
        assert (found.version is None) == (found.missing is not None)
        assert set(found.dtypes) <= {"fp32", "fp16"}


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 4), (1, 8, 4)])
def test_a_profile_must_ascend(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="ascending"):
        ShapeProfile(*sizes)
