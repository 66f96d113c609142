"""The measurement of LoRAs on engines at full size: what its figures are made of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.full_size.adapters import RANK, compared, write_lora
from s2p_deploy.families.lora import Lora

PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"


def test_ratios_are_those_to_the_engine_without_branches() -> None:
    seconds = {"without": [2.0, 4.0, 2.0, 2.0], "attention": [2.2, 4.4, 2.2, 2.2]}
    processor = {"without": [1.0] * 4, "attention": [1.5] * 4}
    found = compared(seconds, processor)
    assert found["median_s"] == {"without": 2.0, "attention": 2.2}
    assert set(found["ratio"]) == {"attention"}
    assert found["ratio"]["attention"]["median"] == pytest.approx(1.1)
    assert found["processor_ratio"]["attention"]["median"] == pytest.approx(1.5)


def test_a_written_lora_is_read_as_one_of_its_layers(tmp_path: Path) -> None:
    slot = SimpleNamespace(layer=PATH, inputs=(6,), outputs=4)
    lora = Lora(write_lora(tmp_path / "lora.safetensors", [slot], 0), {"unet": {PATH: (4, 6)}})
    assert [(layer.path, layer.rank, layer.scale) for layer in lora.layers] == [(PATH, RANK, 0.5)]
