"""Engines that take image prompts: without one they give the bits of engines that take none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from s2p_deploy.engines import BuildOptions, build_engine, load_engine
from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from tests.artifacts import tiny_calibrated, tiny_inputs

if TYPE_CHECKING:
    from s2p_deploy.records import ExportedGraph

WIDTH = 32 + 64 + 32 + 32


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportedGraph, ExportedGraph]:
    """Without and with image prompts."""
    folder = tmp_path_factory.mktemp("graphs")
    model = tiny_calibrated(folder / "calib")
    return export_graph(model, folder / "plain"), export_graph(model, folder / "taking", images=(3, 2))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_without_a_prompt_no_bit_changes(
    graphs: tuple[ExportedGraph, ExportedGraph],
    backend: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """In float32: in bfloat16, OpenVINO fuses an attention with what quantizes its result, unless a sum is between."""
    folder, options, inputs = tmp_path_factory.mktemp("engines"), BuildOptions(), tiny_inputs(3)
    random, found = np.random.default_rng(0), []
    for number, graph in enumerate(graphs):
        engine = build_engine(graph, folder / str(number), backend=backend, options=options)
        assert engine.images == graph.images
        with load_engine(engine, graph) as runner:
            found.append(runner.infer(inputs)["noise_pred"])
            if engine.images is None:
                with pytest.raises(InputError, match="no input 'image_keys'"):
                    runner.infer(inputs | {"image_keys": np.zeros((3, 6, WIDTH))})
                continue
            zeros = {spec.name: np.zeros([3, *map(int, spec.shape[1:])]) for spec in runner.optional}
            found.append(runner.infer(inputs | zeros)["noise_pred"])
            prompt = {name: random.standard_normal(value.shape) for name, value in zeros.items()}
            assert np.abs(runner.infer(inputs | prompt)["noise_pred"] - found[0]).max() > 0.1
            with pytest.raises(InputError, match="image_keys has shape"):
                runner.infer(inputs | {"image_keys": np.zeros((3, 5, WIDTH))})
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])
