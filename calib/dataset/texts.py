"""What prompts are to the denoiser, each distinct text once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from safetensors.torch import load_file

from s2p_deploy.families import EncodedText, encode_texts
from s2p_deploy.records.whole_files import write_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from s2p_deploy.records import PromptSet

TEXT_BATCH = 64


@dataclass(frozen=True)
class PromptTexts:
    """The ``distinct`` texts of prompts; ``cond`` and ``uncond`` int64 [prompts] index them."""

    distinct: EncodedText
    cond: Tensor
    uncond: Tensor


def encode_prompts(pipe: DiffusionPipeline, prompts: PromptSet, max_sequence_length: int) -> PromptTexts:
    """Prompts and negative prompts by the pipeline's own text encoders, where those are; on the CPU.

    ``max_sequence_length`` as for :func:`encode_texts`.
    """
    texts = list(dict.fromkeys(prompt.text for prompt in prompts.prompts))
    negatives = list(dict.fromkeys(prompt.negative for prompt in prompts.prompts))
    parts = [(batch, False) for batch in _batches(texts)] + [(batch, True) for batch in _batches(negatives)]
    encoded = [
        encode_texts(pipe, batch, negative=negative, max_sequence_length=max_sequence_length)
        for batch, negative in parts
    ]
    cond = torch.tensor([texts.index(prompt.text) for prompt in prompts.prompts])
    uncond = torch.tensor([len(texts) + negatives.index(prompt.negative) for prompt in prompts.prompts])
    return PromptTexts(EncodedText.cat(encoded), cond, uncond)


def _batches(texts: Sequence[str]) -> list[Sequence[str]]:
    return [texts[start : start + TEXT_BATCH] for start in range(0, len(texts), TEXT_BATCH)]


def texts_once(pipe: DiffusionPipeline, prompts: PromptSet, max_sequence_length: int, path: Path) -> PromptTexts:
    """The texts in ``path``, made by the process that comes first; any other waits for it."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            made = encode_prompts(pipe, prompts, max_sequence_length)
            named = {"texts": made.distinct.states, "added_cond": made.distinct.added_cond}
            write_tensors(path, named | {"cond_text": made.cond, "uncond_text": made.uncond})
    stored = load_file(path)
    return PromptTexts(EncodedText(stored["texts"], stored["added_cond"]), stored["cond_text"], stored["uncond_text"])
