from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from artifacts import tiny_inputs, tiny_unet

from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.export.float_networks import time_path_model
from s2p_deploy.export.tensors import write_model
from s2p_deploy.families import TimePath, load_pipeline, load_time_path
from tests.small_pipelines import tiny_base

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from s2p_deploy.records import CalibratedModel, ExportedGraph


def test_the_graph_computes_the_constant_table(
    w4a4: CalibratedModel, w4a4_graph: ExportedGraph, run_onnx: Callable
) -> None:
    timesteps = np.arange(1000, dtype=np.float32)
    found = run_onnx(w4a4_graph.folder / "conditioning.onnx", {"timesteps": timesteps})["time_projections"]
    table = w4a4.time_table().projections
    assert found.dtype == np.float32
    assert np.abs(found - table).max() < 1e-5 * np.abs(table).max()


def test_the_graph_agrees_with_diffusers_between_timesteps(w4a4_graph: ExportedGraph, run_onnx: Callable) -> None:
    unet = tiny_unet()
    path = TimePath(unet)
    timesteps = np.float32([0.25, 137.625, 500.0, 998.9])
    seen: dict[str, np.ndarray] = {}
    for name in path.slices:
        unet.get_submodule(name).time_emb_proj.register_forward_hook(
            lambda _module, _args, output, name=name: seen.update({name: output.numpy()})
        )
    inputs = {name: torch.from_numpy(value) for name, value in tiny_inputs(4).items()}
    with torch.no_grad():
        unet(inputs["sample"], torch.from_numpy(timesteps), inputs["encoder_hidden_states"])
    found = run_onnx(w4a4_graph.folder / "conditioning.onnx", {"timesteps": timesteps})["time_projections"]
    assert list(seen) != []
    for name, (start, stop) in path.slices.items():
        assert found[:, start:stop] == pytest.approx(seen[name], abs=1e-5 * float(np.abs(found).max()))


@torch.no_grad()
def test_only_the_time_path_of_a_stored_pipeline_is_read(tmp_path: Path, run_onnx: Callable) -> None:
    base = tiny_base(tmp_path / "pipeline")
    path, whole = load_time_path(base), TimePath(load_pipeline(base).unet)
    timesteps = torch.tensor([3.0, 700.5])
    assert path.slices == whole.slices
    assert torch.equal(path(timesteps), whole(timesteps))
    write_model(time_path_model(path), tmp_path / "conditioning.onnx")
    found = run_onnx(tmp_path / "conditioning.onnx", {"timesteps": timesteps.numpy()})["time_projections"]
    assert found == pytest.approx(whole(timesteps).numpy(), abs=1e-5)


def test_a_pipeline_with_a_weight_missing_is_refused(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "pipeline")
    next((base.folder / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"unet/diffusion_pytorch_model\.safetensors is missing"):
        load_time_path(base)


def test_the_input_form_needs_the_models_own_time_path(w4a4: CalibratedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs the time path"):
        export_graph(w4a4, tmp_path / "none", time_table="input")
    with pytest.raises(InputError, match="another time table"):
        export_graph(w4a4, tmp_path / "other", time_table="input", time_path=TimePath(tiny_unet(seed=5)))
    assert list(tmp_path.iterdir()) == []
