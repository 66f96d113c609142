"""A ControlNet that computes on an engine, in the place of diffusers' own; and either kind opened from a folder."""

from __future__ import annotations

import math
from contextlib import ExitStack
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ControlNetModel, SD3ControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetOutput
from safetensors.torch import load as tensors_from

from s2p_deploy.engines import load_engine
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families.checkpoint import Checkpoint
from s2p_deploy.families.controlnet_family import divided_residuals
from s2p_deploy.families.controlnets import check_fits, load_controlnet, residual_maps
from s2p_deploy.families.registry import controlnet_kind
from s2p_deploy.pipeline.components import EngineDenoiser
from s2p_deploy.records import Engine
from s2p_deploy.records.artifacts import MANIFEST, read_verified
from s2p_deploy.records.exported_graph import CONTROL_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from diffusers import ModelMixin
    from torch import Tensor, nn

    from s2p_deploy.engines import BoundRunner, Runner

_GUESSED = -1  # exponent of the first residual's strength in guess mode; the last one's is 0


class EngineControlNet(EngineDenoiser):
    """A ControlNet on an engine.

    Args:
        engine: of a calibrated ControlNet.
        bound: the engine, loaded.
        embedding: embeds control pictures, once for all steps of a drawing.
        maps: the channels of every residual, and the latents on a side of each of its places.
        runner: computes in the place of ``bound`` (None: that itself).
    """

    def __init__(
        self,
        engine: Engine,
        bound: BoundRunner,
        embedding: nn.Module,
        maps: Sequence[tuple[int, int]],
        runner: Runner | None = None,
    ) -> None:
        config = engine.denoiser_config
        own = runner or bound
        super().__init__(own, config, bound.timesteps, bound.profile, engine=engine, indices=bound.indices)
        self.bound, self.embedding, self.maps = bound, embedding, maps
        self._kind = controlnet_kind(config)
        self._embedded: tuple[Tensor, Tensor] | None = None  # a control picture, and its embedding

    @classmethod
    def load(cls, folder: Path, schedules: Any = (), device: str = "auto") -> EngineControlNet:  # noqa: ANN401 - as its base
        """Loads the ControlNet of an engine on disk, as the class that its pipelines ask for.

        Raises:
            InputError: the engine is none of a ControlNet. Others as :meth:`EngineDenoiser.load`.
        """
        engine = Engine.open(folder)
        if CONTROL_FILE not in engine.manifest.files:
            raise InputError(f"{folder} is no engine of a ControlNet: give one, or a ControlNet in diffusers format")
        config = dict(engine.denoiser_config)
        embedding = controlnet_kind(config).build_embedding(config)
        try:
            embedding.load_state_dict(tensors_from(bytes(read_verified(engine, CONTROL_FILE))))
        except (RuntimeError, ValueError) as error:
            raise IntegrityError(f"{folder / CONTROL_FILE} is damaged: build the engine again") from error
        runner = load_engine(engine, schedules=schedules, device=device)
        own = next(
            kind for kind in (EngineUNetControlNet, EngineSD3ControlNet) if kind.replaces == config["_class_name"]
        )
        return own(engine, runner, embedding.eval().requires_grad_(requires_grad=False), residual_maps(config))

    def computing_on(self, runner: Runner) -> EngineControlNet:
        """Makes a copy that computes on another runner, of the same inputs."""
        return type(self)(self.saved_engine(), self.bound, self.embedding, self.maps, runner).place(
            self.device, self.dtype
        )

    def __copy__(self) -> EngineControlNet:
        return self.computing_on(self.runner)

    def __deepcopy__(self, _memo: dict[int, object]) -> EngineControlNet:
        return copy(self)

    def _controlled(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor,
        picture: Tensor,
        conditions: Mapping[str, object],
    ) -> list[Tensor]:
        """Computes the residuals as maps [batch, c, rows, columns]."""
        control = self._embedding_of(picture)
        given = torch.cat([sample, control.to(sample.dtype).expand(len(sample), -1, -1, -1)], 1)
        return divided_residuals(self._predict(given, timestep, text, conditions), self.maps)

    def _residuals(self, sample: Tensor, conditions: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns none: a ControlNet takes no residuals."""
        del sample, conditions
        return {}

    @torch.no_grad()
    def _embedding_of(self, picture: Tensor) -> Tensor:
        """Embeds control pictures; those of the call before, as in a sampling loop, are not embedded again."""
        if self._embedded is None or self._embedded[0] is not picture:
            weights = next(self.embedding.parameters())
            pictures = self._channels(picture).to(weights.device, weights.dtype)
            self._embedded = picture, self._kind.spread(self.embedding(pictures), dict(self.config))
        return self._embedded[1]

    def _channels(self, picture: Tensor) -> Tensor:
        """Returns a control picture with its channels in the order that the network reads."""
        return picture


class EngineUNetControlNet(EngineControlNet, ControlNetModel):  # type: ignore[misc]  # diffusers is not typed
    """Replaces a ``ControlNetModel``, which it is an instance of because diffusers' pipelines ask for one."""

    replaces = "ControlNetModel"

    def forward(  # noqa: PLR0913 - as ControlNetModel's
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        *,
        guess_mode: bool = False,
        return_dict: bool = True,
        **conditions: object,
    ) -> ControlNetOutput | tuple[list[Tensor], Tensor]:
        """Computes the residuals for the down blocks and the middle block, as ControlNetModel does.

        Args:
            sample: [batch, C, H, W] latents after ``scale_model_input``.
            timestep: the scheduler's value: a number, a scalar tensor or one of [batch].
            encoder_hidden_states: [batch, tokens, D] text states.
            controlnet_cond: [batch, 3, height, width] control pictures in [0, 1].
            conditioning_scale: strength of the residuals.
            guess_mode: lets deeper residuals act more than the first ones.
            return_dict: returns a record instead of a tuple.
            conditions: everything else: SDXL's ``added_cond_kwargs``; the rest only where it is empty.

        Raises:
            InputError: as :meth:`EngineUNet.forward`.
        """
        residuals = self._controlled(sample, timestep, encoder_hidden_states, controlnet_cond, conditions)
        if guess_mode and not self.config.global_pool_conditions:
            strengths = torch.logspace(_GUESSED, 0, len(residuals), device=sample.device) * conditioning_scale
            residuals = [each * strength for each, strength in zip(residuals, strengths, strict=True)]
        else:
            residuals = [each * conditioning_scale for each in residuals]
        if self.config.global_pool_conditions:
            residuals = [each.mean((2, 3), keepdim=True) for each in residuals]
        *down, middle = residuals
        if not return_dict:
            return down, middle
        return ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=middle)

    def _channels(self, picture: Tensor) -> Tensor:
        return picture.flip(1) if self.config.controlnet_conditioning_channel_order == "bgr" else picture


class EngineSD3ControlNet(EngineControlNet, SD3ControlNetModel):  # type: ignore[misc]  # diffusers is not typed
    """Replaces an ``SD3ControlNetModel``, which it is an instance of because diffusers' pipelines ask for one."""

    replaces = "SD3ControlNetModel"

    def forward(
        self,
        hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        *,
        encoder_hidden_states: Tensor,
        timestep: Tensor | float,
        return_dict: bool = True,
        **conditions: object,
    ) -> SD3ControlNetOutput | tuple[list[Tensor]]:
        """Computes the residuals of the blocks [batch, patches, D], as SD3ControlNetModel does.

        Args:
            hidden_states: [batch, C, H, W] latents.
            controlnet_cond: [batch, C, H, W] latents of control pictures.
            conditioning_scale: strength of the residuals.
            encoder_hidden_states: [batch, tokens, D] text states.
            timestep: the scheduler's value: a number, a scalar tensor or one of [batch].
            return_dict: returns a record instead of a tuple.
            conditions: ``pooled_projections``; the rest only where it is empty.

        Raises:
            InputError: as :meth:`EngineTransformer.forward`.
        """
        maps = self._controlled(hidden_states, timestep, encoder_hidden_states, controlnet_cond, conditions)
        residuals = [each.flatten(2).transpose(1, 2) * conditioning_scale for each in maps]
        return SD3ControlNetOutput(controlnet_block_samples=tuple(residuals)) if return_dict else (residuals,)


def controlnet_memory(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[bool, int]:
    """Counts the bytes of a ControlNet's weights before it is opened, and tells whether they are a GPU's.

    Args:
        folder: of either kind that :func:`open_controlnet` takes.
        dtype: of a floating-point one's weights.
        device: of a floating-point one.

    Raises:
        InputError: there are no weights. IntegrityError: an engine was changed.
    """
    if (folder / MANIFEST).is_file():
        engine = Engine.open(folder)
        return engine.on_gpu, sum(engine.sizes.values())
    numbers = sum(math.prod(tensor.shape) for tensor in Checkpoint(folder).tensors.values())
    return device.type != "cpu", numbers * dtype.itemsize


def open_controlnet(
    folder: Path,
    denoiser_config: dict[str, Any],
    pixels_per_latent: int,
    dtype: torch.dtype | None = None,
    device: str = "auto",
) -> ModelMixin:
    """Opens a ControlNet: in diffusers format, in floating point, or an engine of a calibrated one.

    Args:
        folder: of either.
        denoiser_config: of the network that takes its residuals.
        pixels_per_latent: pixels on a side of a picture for one latent.
        dtype: of a floating-point one's weights; None is float32.
        device: of a context, where an engine runs on a GPU.

    Raises:
        InputError: there is none, or it does not fit. IntegrityError: an engine was changed.
        MissingEnvironmentError: an engine does not run here.
    """
    if not (folder / MANIFEST).is_file():
        return load_controlnet(folder, denoiser_config, pixels_per_latent, dtype)
    with ExitStack() as opened:
        network = EngineControlNet.load(folder, device=device)
        opened.callback(network.close)
        check_fits(folder, network.config, network.maps, denoiser_config, pixels_per_latent)
        opened.pop_all()
    return network.place(network.device, dtype or torch.float32)
