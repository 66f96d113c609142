"""Calibrated tiny denoisers, exported once for all tests here, and ONNX Runtime without optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime as ort
import pytest
from artifacts import tiny_calibrated, tiny_unet

from s2p_deploy.export import export_graph
from s2p_deploy.families import TimePath

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    import onnx

    from s2p_deploy.records import CalibratedModel, ExportedGraph

Run = "Callable[[onnx.ModelProto | Path, Mapping[str, np.ndarray]], dict[str, np.ndarray]]"


@pytest.fixture(scope="session")
def run_onnx() -> Run:
    """Runs a model in ORT_DISABLE_ALL on what it needs of the given values; outputs by name."""

    def run(model: onnx.ModelProto | Path, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        source = model.SerializeToString() if hasattr(model, "SerializeToString") else str(model)
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        feeds = {item.name: values[item.name] for item in session.get_inputs()}
        return dict(zip([item.name for item in session.get_outputs()], session.run(None, feeds), strict=True))

    return run


@pytest.fixture(scope="session")
def w8a8(tmp_path_factory: pytest.TempPathFactory) -> CalibratedModel:
    return tiny_calibrated(tmp_path_factory.mktemp("w8a8") / "calib")


@pytest.fixture(scope="session")
def w4a4(tmp_path_factory: pytest.TempPathFactory) -> CalibratedModel:
    return tiny_calibrated(tmp_path_factory.mktemp("w4a4") / "calib", "int4", "int4")


@pytest.fixture(scope="session")
def w8a8_graph(w8a8: CalibratedModel) -> ExportedGraph:
    return export_graph(w8a8, w8a8.folder.parent / "fp32")


@pytest.fixture(scope="session")
def w8a8_half_graph(w8a8: CalibratedModel) -> ExportedGraph:
    return export_graph(w8a8, w8a8.folder.parent / "fp16", dtype="fp16")


@pytest.fixture(scope="session")
def w4a4_graph(w4a4: CalibratedModel) -> ExportedGraph:
    """In the form whose time projections are an input."""
    time_path = TimePath(tiny_unet(seed=0))
    return export_graph(w4a4, w4a4.folder.parent / "input", time_table="input", time_path=time_path)
