"""Controls of a drawing: ControlNets, each with the picture that it reads, its strength, and when it acts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import InputError
from s2p_deploy.families import denoiser_of
from s2p_deploy.pipeline.components import EngineDenoiser

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline, ModelMixin
    from PIL.Image import Image


MOST_SCALE = 10.0


@dataclass(frozen=True)
class Control:
    """A ControlNet and what it reads.

    Attributes:
        network: gives the residuals.
        picture: RGB, of the size that is drawn.
        scale: strength of the residuals, 0 to 10.
        start: share of the steps after which it begins to act.
        end: share of the steps after which it no longer acts.
    """

    network: ModelMixin
    picture: Image
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and 0 <= self.scale <= MOST_SCALE):
            raise InputError(f"a control's scale of {self.scale:g} is out of range: give one from 0 to {MOST_SCALE:g}")
        if not 0 <= self.start < self.end <= 1:
            raise InputError(
                f"a control that acts from {self.start:g} to {self.end:g} does not: give shares of the steps, ascending"
                " from 0 to 1"
            )


def check_controls(pipe: DiffusionPipeline, controls: Sequence[Control], size: tuple[int, int]) -> None:
    """Checks that a pipeline draws pictures of a ``size`` in pixels under controls.

    Raises:
        InputError: its engine takes no residuals, or a picture has another size.
    """
    denoiser = denoiser_of(pipe)
    if controls and isinstance(denoiser, EngineDenoiser) and not denoiser.takes_residuals:
        raise InputError("this engine takes no ControlNet: export with --controlnet, and build again")
    for control in controls:
        given = control.picture.height, control.picture.width
        if given != size:
            raise InputError(
                f"the control picture has {given[1]}x{given[0]} pixels, and {size[1]}x{size[0]} are drawn: give one of"
                " that size"
            )


def control_arguments(pipe: DiffusionPipeline, controls: Sequence[Control], *, started: bool) -> dict[str, Any]:
    """Makes the keyword arguments of a stock ControlNet pipeline for its ControlNets, in their order.

    ``started``: the pipeline starts from a picture, which has the name ``image`` then.
    """
    named = "image" if not started and hasattr(pipe, "unet") else "control_image"
    values: dict[str, list[Any]] = {
        named: [control.picture for control in controls],
        "controlnet_conditioning_scale": [float(control.scale) for control in controls],
        "control_guidance_start": [float(control.start) for control in controls],
        "control_guidance_end": [float(control.end) for control in controls],
    }
    return {name: value if len(controls) > 1 else value[0] for name, value in values.items()}
