from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from s2p_deploy.calib.streaming import DenoiserWeights, TensorSource, split_sources
from s2p_deploy.errors import InputError
from s2p_deploy.families import SplitConv2d
from s2p_deploy.families.checkpoint import Checkpoint

CONV = torch.nn.Conv2d(5, 3, 2)
SOURCES = {"network.conv.weight": "conv.weight", "network.conv.bias": "conv.bias"}
SHAPES = {"network.conv.weight": (3, 5, 2, 2), "network.conv.bias": (3,)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    state = {f"conv.{name}": tensor.detach().half() for name, tensor in CONV.named_parameters()}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    return Checkpoint(tmp_path)


def test_a_split_convolution_is_two_slices(checkpoint: Checkpoint) -> None:
    expected = {f"network.conv.{name}": tensor for name, tensor in SplitConv2d(CONV, 2).half().state_dict().items()}
    pieces = split_sources(SOURCES, SHAPES, {"conv": 2})
    weights = DenoiserWeights(checkpoint, pieces, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    for name, tensor in expected.items():
        read = weights.read(name)
        assert torch.equal(read, tensor)
        assert read.is_contiguous()


def test_a_split_convolution_without_a_bias() -> None:
    weight = {"network.conv.weight": "conv.weight"}
    assert split_sources(weight, SHAPES, {"conv": 2}) == {
        "network.conv.head.weight": TensorSource("conv.weight", (0, 2)),
        "network.conv.skip.weight": TensorSource("conv.weight", (2, 5)),
    }


@pytest.mark.parametrize("split", [{}, {"conv": 2}])
def test_weights_of_another_configuration_are_refused(checkpoint: Checkpoint, split: dict[str, int]) -> None:
    wider = SHAPES | {"network.conv.weight": (3, 6, 2, 2)}
    pieces = split_sources(SOURCES, wider, split)
    after = {name: pieces[name].shape(wider["network.conv.weight"]) for name in pieces if "weight" in name}
    shapes = {name: after.get(name, (3,)) for name in pieces}
    with pytest.raises(InputError, match=r"conv\.weight is \[3, 5, 2, 2\], which does not fit config\.json"):
        DenoiserWeights(checkpoint, pieces, shapes)


def test_a_weight_that_is_no_convolutions(checkpoint: Checkpoint) -> None:
    piece = {"network.conv.head.weight": TensorSource("conv.bias", (0, 2))}
    with pytest.raises(InputError, match=r"conv\.bias is \[3\], which does not fit config\.json"):
        DenoiserWeights(checkpoint, piece, {"network.conv.head.weight": (3, 2, 2, 2)})


def test_a_missing_tensor_is_told_before_any_is_read(checkpoint: Checkpoint) -> None:
    pieces = {"network.norm.weight": TensorSource("norm.weight")}
    with pytest.raises(InputError, match=r"lacks norm\.weight"):
        DenoiserWeights(checkpoint, pieces, {"network.norm.weight": (3,)})
