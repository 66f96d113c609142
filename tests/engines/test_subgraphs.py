"""Parts that are cut out of engine files give what the whole engine gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from s2p_deploy.engines import build_engine, engine_subgraphs, load_engine
from s2p_deploy.errors import GraphContractError, IntegrityError
from s2p_deploy.export import export_graph
from s2p_deploy.records import Engine, ExportedGraph
from tests.artifacts import tiny_calibrated, tiny_inputs

BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    folder = tmp_path_factory.mktemp("parts")
    return export_graph(tiny_calibrated(folder / "calib", "int4", "int8"), folder / "graph")


@pytest.fixture(scope="module")
def engines(graph: ExportedGraph, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    folder = tmp_path_factory.mktemp("engines")
    return {backend: build_engine(graph, folder / backend, backend=backend) for backend in BACKENDS}


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_cut_out_is_the_engine(graph: ExportedGraph, engines: dict[str, Engine], backend: str) -> None:
    inputs = tiny_inputs()
    with load_engine(engines[backend]) as whole, engine_subgraphs(engines[backend], graph) as parts:
        expected = whole.infer(inputs)["noise_pred"]
        assert parts is not None
        part = parts.between(["sample"], ["noise_pred"])
        assert set(part.types) == {*inputs, "act_scales"}
        found = part.runner.infer(inputs | {"act_scales": graph.scales.scales})["noise_pred"]
    # compiled for other shapes: codes on a border may flip
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_halves_in_a_row_are_the_engine(graph: ExportedGraph, engines: dict[str, Engine], backend: str) -> None:
    conv_in, rest = (next(s for s in graph.layers if s.name == name) for name in ("conv_in", "conv_out"))
    sample = tiny_inputs()["sample"]
    with engine_subgraphs(engines[backend], graph) as parts:
        assert parts is not None
        first = parts.between([conv_in.input], [conv_in.output])
        assert list(first.types) == ["sample"]
        assert first.runner.infer({"sample": sample})[conv_in.output].shape == (2, 32, 8, 8)
        last = parts.between([rest.input], [rest.output])
        assert list(last.types) == [rest.input]


@pytest.mark.parametrize("backend", BACKENDS)
def test_constants_are_read_and_unknown_names_refused(
    graph: ExportedGraph, engines: dict[str, Engine], backend: str
) -> None:
    with engine_subgraphs(engines[backend], graph) as parts:
        assert parts is not None
        table = parts.constant("time_projections")
        assert table is not None
        assert table.shape[0] == len(graph.timesteps)
        assert parts.constant("none of them") is None
        with pytest.raises(GraphContractError, match="no tensor none of them"):
            parts.between(["sample"], ["none of them"])


def test_the_files_that_are_cut_are_verified(graph: ExportedGraph, engines: dict[str, Engine], tmp_path: Path) -> None:
    for backend, name in (("onnxruntime", "denoiser.onnx.data"), ("openvino", "denoiser.bin")):
        shutil.copytree(engines[backend].folder, tmp_path / backend)
        data = bytearray((tmp_path / backend / name).read_bytes())
        data[100] ^= 1
        (tmp_path / backend / name).write_bytes(data)
        with pytest.raises(IntegrityError), engine_subgraphs(Engine.open(tmp_path / backend), graph):
            pass
