"""IP-Adapter files: what is no whole one is refused in one line; weights are checked in tests of pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from s2p_deploy.errors import InputError
from s2p_deploy.families.ip_adapter import attention_frame, check_ip_adapter, cross_attentions, read_ip_adapter
from tests.random_ip_adapters import random_ip_adapter, write_ip_adapter
from tests.tiny_networks import tiny_sdxl_unet, tiny_unet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_ip_adapter(tmp_path / "adapter", tiny_unet(12))


def test_a_file_is_read_as_diffusers_takes_it(file: Path) -> None:
    found, expected = read_ip_adapter(file), random_ip_adapter(tiny_unet(12))
    assert {part: set(own) for part, own in found.items()} == {part: set(own) for part, own in expected.items()}
    assert torch.equal(found["ip_adapter"]["1.to_k_ip.weight"], expected["ip_adapter"]["1.to_k_ip.weight"])


def pickled(file: Path) -> None:
    file.write_bytes(b"PK\x03\x04" + bytes(200))  # as PyTorch begins its files


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def lora(file: Path) -> None:
    save_file({"unet.mid_block.to_q.lora_A.weight": torch.ones(1)}, file)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (pickled, "no whole safetensors file .* pickled .bin, which can run code"),
        (truncated, "no whole safetensors file"),
        (lora, "has a tensor 'unet.mid_block.to_q.lora_A.weight': it is no IP-Adapter"),
        (lambda file: file.unlink(), "does not exist: give a .safetensors file"),
    ],
)
def test_other_files_are_refused(file: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(file)
    with pytest.raises(InputError, match=words) as refused:
        read_ip_adapter(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("kind", "tokens"), [("plain", 4), ("plus", 8)])
def test_attentions_of_sdxl_are_counted_as_diffusers_numbers_them(kind: str, tokens: int) -> None:
    unet = tiny_sdxl_unet()
    frame = attention_frame(dict(unet.config))
    assert not list(frame.parameters())
    assert len(cross_attentions(frame)) == 8
    widths = [(unet.get_submodule(path).to_q.out_features, 12) for path in cross_attentions(frame)]
    assert check_ip_adapter(random_ip_adapter(unet, kind), "one", widths) == tokens
