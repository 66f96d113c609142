"""Text encoders and autoencoder as ONNX: names, sizes that may vary, and what they compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from s2p_deploy.context import silent
from s2p_deploy.export.float_networks import component_model
from s2p_deploy.export.tensors import write_model
from s2p_deploy.families import resolve_base
from s2p_deploy.families.components import ComponentNetwork, load_component
from tests.engines.small_graph import read_back
from tests.small_pipelines import sibling, small_base, t5_base

if TYPE_CHECKING:
    from pathlib import Path


def written(component: ComponentNetwork, name: str, folder: Path) -> Path:
    file = folder / f"{name}.onnx"
    write_model(component_model(component, name), file, silent)
    return file


def answers(component: ComponentNetwork, file: Path, given: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """What PyTorch and ONNX Runtime make of an input, output by output."""
    with torch.no_grad():
        expected = component.network(given)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(list(component.outputs), {component.input: given.numpy()})
    tensors = expected if isinstance(expected, tuple) else (expected,)
    return [(tensor.numpy(), array) for tensor, array in zip(tensors, found, strict=True)]


def tokens(batch: int, count: int) -> torch.Tensor:
    ids = torch.randint(0, 270, (batch, count), generator=torch.Generator().manual_seed(1))
    ids[:, count // 2 :] = 273  # CLIP pools where this one comes first
    return ids


@pytest.mark.parametrize("name", ["text_encoder", pytest.param("text_encoder_2", marks=pytest.mark.slow)])
def test_a_clip_text_encoder_computes_every_layer_and_the_pooled_states(name: str, tmp_path: Path) -> None:
    component = load_component(sibling("sdxl"), name)
    file = written(component, name, tmp_path)
    for batch in (1, 3):
        for expected, found in answers(component, file, tokens(batch, 24)):
            np.testing.assert_allclose(found, expected, atol=1e-4)
    nodes = {node.name for node in onnx.load(file, load_external_data=False).graph.node}
    path = "encoder.layers.0.self_attn.q_proj/MatMul"
    assert {path, f"text_model.{path}"} & nodes, "named after the modules"
    assert all(node and "hook" not in node for node in nodes)
    read_back(file)  # nothing in it is refused


@pytest.mark.slow
def test_a_t5_encoder_takes_any_number_of_tokens(tmp_path: Path) -> None:
    component = load_component(t5_base(tmp_path / "pipeline"), "text_encoder_3")
    assert component.outputs == ("last_hidden_state",)
    file = written(component, "text_encoder_3", tmp_path)
    for shape in ((1, 8), (3, 77)):
        ((expected, found),) = answers(component, file, tokens(*shape))
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("base", ["small", pytest.param("shapes", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "channels"), [("vae_decoder", 4), ("vae_encoder", 3)])
def test_half_an_autoencoder_takes_pictures_of_any_size(base: str, name: str, channels: int, tmp_path: Path) -> None:
    component = load_component(small_base(tmp_path / "p") if base == "small" else resolve_base(base), name)
    factor = 1 if name == "vae_decoder" else 2 ** (len(component.config["block_out_channels"]) - 1)
    file = written(component, name, tmp_path)
    for batch, height, width in ((1, 8, 8), (3, 10, 14)):
        given = torch.rand(batch, channels, height * factor, width * factor, generator=torch.Generator().manual_seed(2))
        ((expected, found),) = answers(component, file, given)
        error = np.square(found - expected).mean() / np.square(expected).mean()
        assert 10 * np.log10(error) < -90
    weights = {value.name for value in onnx.load(file, load_external_data=False).graph.initializer}
    assert f"{name.removeprefix('vae_')}.conv_in.weight" in weights


def test_weights_are_read_when_they_are_written() -> None:
    """A graph holds no second copy of them."""
    component = load_component(sibling("sdxl"), "text_encoder")
    stored = [value.const_value for value in component_model(component, "text_encoder").graph.initializers.values()]
    assert not [tensor for tensor in stored if tensor.nbytes > 1024 and not isinstance(tensor, ir.LazyTensor)]
