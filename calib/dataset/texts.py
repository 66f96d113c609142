"""Text states of prompts, each distinct text once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from safetensors.torch import load_file

from s2p_deploy.calib.atomic import write_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import StableDiffusionPipeline
    from torch import Tensor

    from s2p_deploy.records import PromptSet

TEXT_BATCH = 64


@dataclass(frozen=True)
class TextStates:
    """``states`` float32 [m, tokens, D] of the distinct texts; ``cond`` and ``uncond`` int64 [prompts] index them."""

    states: Tensor
    cond: Tensor
    uncond: Tensor


def encode_texts(pipe: StableDiffusionPipeline, prompts: PromptSet) -> TextStates:
    """Text states of prompts and negative prompts by the pipeline's own text encoder, where that is; on the CPU."""
    texts = list(dict.fromkeys(text for prompt in prompts.prompts for text in (prompt.text, prompt.negative)))
    batches = [texts[start : start + TEXT_BATCH] for start in range(0, len(texts), TEXT_BATCH)]
    device = pipe.text_encoder.device
    with torch.no_grad():
        encoded = [pipe.encode_prompt(batch, device, 1, do_classifier_free_guidance=False)[0] for batch in batches]
    place = {text: index for index, text in enumerate(texts)}
    cond = torch.tensor([place[prompt.text] for prompt in prompts.prompts])
    uncond = torch.tensor([place[prompt.negative] for prompt in prompts.prompts])
    return TextStates(torch.cat([states.float().cpu() for states in encoded]), cond, uncond)


def texts_once(pipe: StableDiffusionPipeline, prompts: PromptSet, path: Path) -> TextStates:
    """The text states in ``path``, made by the process that comes first; any other waits for it."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            texts = encode_texts(pipe, prompts)
            write_tensors(path, {"texts": texts.states, "cond_text": texts.cond, "uncond_text": texts.uncond})
    stored = load_file(path)
    return TextStates(stored["texts"], stored["cond_text"], stored["uncond_text"])
