"""The small SD3 with a third text encoder: T5's kind with random weights, fed by a CLIP tokenizer."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import torch
from transformers import T5Config, T5EncoderModel

from s2p_deploy.families import BasePipeline, resolve_base
from tests.sibling_pipelines import PIPELINES
from tests.small_parts import put_small_autoencoder

if TYPE_CHECKING:
    from pathlib import Path

WIDTH = 256  # of SD3's joint text states


def t5_base(folder: Path) -> BasePipeline:
    """Writes it to ``folder``."""
    shutil.copytree(PIPELINES / "shapes-sd3", folder)
    put_small_autoencoder(folder)
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_3")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {"tokenizer_3": index["tokenizer"], "text_encoder_3": ["transformers", "T5EncoderModel"]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=274, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_3")
    return resolve_base(str(folder))
