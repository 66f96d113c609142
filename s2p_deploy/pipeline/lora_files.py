"""LoRA files for a pipeline with an engine in it: held against its networks, and acting while pictures are drawn."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from s2p_deploy.errors import InputError
from s2p_deploy.families import denoiser_of
from s2p_deploy.families.lora import Lora, changeable_weights, component_checkpoints, network_weights
from s2p_deploy.families.lora_fusing import fused
from s2p_deploy.pipeline.engine_component import EngineComponent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.families.lora import GivenLora, Weights


def text_encoders(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """Returns the text encoders of a pipeline that are PyTorch's networks, by component."""
    return {
        name: part
        for name, part in pipe.components.items()
        if name.startswith("text_encoder")
        and isinstance(part, torch.nn.Module)
        and not isinstance(part, EngineComponent)
    }


class LoraReader:
    """Reads LoRA files for a pipeline with an engine in it.

    Args:
        pipe: the pipeline.
        base: the floating-point pipeline that the engine was made from.

    Attributes:
        denoiser: its name in the pipeline.

    Raises:
        InputError: the engine has no low-rank branches.
    """

    def __init__(self, pipe: DiffusionPipeline, base: BasePipeline) -> None:
        loras = denoiser_of(pipe).loras
        _ = loras.bank  # raises
        self.denoiser: str = loras.component
        self._in_memory = text_encoders(pipe)
        on_engines = {
            name: checkpoint
            for name, checkpoint in component_checkpoints(base).items()
            if name not in {self.denoiser, *self._in_memory}
        }
        own = {name: network_weights(network) for name, network in self._in_memory.items()}
        self._weights: Weights = {self.denoiser: loras.weights, **own, **changeable_weights(on_engines)}

    def read(self, file: Path) -> Lora:
        """Opens a LoRA.

        Raises:
            InputError: as :class:`Lora`, or it changes a text encoder that runs on an engine.
        """
        lora = Lora(file, self._weights)
        able = {self.denoiser, *self._in_memory}
        unable = next((layer.component for layer in lora.layers if layer.component not in able), None)
        if unable is not None:
            raise InputError(
                f"LoRA {file} changes the {unable}, which runs on an engine here: leave --components out, or fuse the"
                " LoRA (calibrate --lora)"
            )
        return lora


@contextmanager
def loras_acting(pipe: DiffusionPipeline, base: BasePipeline, given: Sequence[GivenLora]) -> Iterator[None]:
    """Has LoRAs act in a pipeline with an engine in it while the context lasts.

    Args:
        pipe: the pipeline; its text encoders have the LoRAs in their weights meanwhile.
        base: the floating-point pipeline that the engine was made from.
        given: files and weights (empty: nothing is done).

    Raises:
        InputError: the engine has no branches that fit, a file cannot be read, or one is given twice.
    """
    if not given:
        yield
        return
    reader, loaded = LoraReader(pipe, base), denoiser_of(pipe).loras
    names = [str(each.file) for each in given]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"LoRA {twice} is given twice: give it once, with one weight")
    opened = [(reader.read(each.file), each.weight) for each in given]
    for name, (lora, _) in zip(names, opened, strict=True):
        loaded.add(lora, name)
    former = {name: weight for name, weight in loaded.active.items() if name not in names}
    loaded.set({str(each.file): each.weight for each in given})
    try:
        with fused(text_encoders(pipe), opened):
            yield
    finally:
        loaded.delete(names)
        loaded.active = former
