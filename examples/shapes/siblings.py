"""The siblings of the bundled pipeline: denoisers of other kinds over its autoencoder and captions.

A sibling is assembled with an untrained denoiser first; what the denoiser is then trained on comes out of the
pipeline's own ``encode_prompt``, so it is what the finished pipeline will feed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sibling_inpaint
import sibling_lcm
import sibling_refiner
import sibling_sd2
import sibling_sd3
import sibling_sd35
import sibling_sdxl
import torch
from autoencoder import scaled_latents
from text_encoders import tokenize
from training import Schedule, last_weights, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    Loss = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Sibling:
    """How one kind is put together and trained; ``loss(pipe, latents, captions)`` gives the training loss.

    ``base`` is the sibling that it is fine-tuned from (None: the bundled pipeline).
    """

    schedule: Schedule
    guidance_scale: float
    assemble: Callable[[Path, Any], DiffusionPipeline]
    loss: Callable[[Any, Tensor, list[str]], Loss]
    base: str | None = None


def _of(kind: ModuleType, base: str | None = None) -> Sibling:
    return Sibling(kind.SCHEDULE, kind.GUIDANCE_SCALE, kind.assemble, kind.loss, base)


SIBLINGS = {
    "sd2": _of(sibling_sd2),
    "sdxl": _of(sibling_sdxl),
    "sd3": _of(sibling_sd3),
    "sd35": _of(sibling_sd35, "sd3"),
    "inpaint": _of(sibling_inpaint),
    "lcm": _of(sibling_lcm),
    "refiner": _of(sibling_refiner, "sdxl"),
}


def train_sibling(kind: str, folder: Path, base: DiffusionPipeline, *, snapshot: bool) -> DiffusionPipeline:
    """Trains (or goes on with) a sibling over the parts of ``base``.

    With ``snapshot`` nothing is trained: the denoiser gets the weights of its last checkpoint in ``folder``, which a
    training may be writing at the same time.
    """
    sibling = SIBLINGS[kind]
    torch.manual_seed(0)
    pipe = sibling.assemble(folder, base)
    denoiser: nn.Module = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    checkpoint = folder / f"{kind}.safetensors"
    if snapshot:
        denoiser.load_state_dict(last_weights(checkpoint))
        return pipe
    denoiser.train()
    loss = sibling.loss(pipe, *scaled_latents(pipe.vae, folder))
    denoiser.load_state_dict(train(denoiser, loss, sibling.schedule, checkpoint))
    denoiser.eval()
    tokenize(base.tokenizer, [""])  # its file records how it was last called: as the bundled one's
    return pipe
