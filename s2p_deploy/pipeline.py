"""The engine as a component of a stock diffusers pipeline: it stands where the UNet stood."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from diffusers import ModelMixin, StableDiffusion3Pipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from s2p_deploy.engines.runner import ADDED_COND, OUTPUT
from s2p_deploy.engines.tensor_runner import TensorRunner
from s2p_deploy.errors import InputError
from s2p_deploy.families import denoiser_of, kind_of_config, latent_shape_of, with_denoiser
from s2p_deploy.schedulers import scheduler_by_name
from s2p_deploy.timesteps import rows_of_timesteps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from s2p_deploy.engines import BoundRunner, Runner, ShapeProfile
    from s2p_deploy.recipe import Sampling
    from s2p_deploy.records import Engine, Prompt, TimestepTable


_ADDED = ("added_cond_kwargs", "pooled_projections")  # what carries the added conditions


@dataclass(frozen=True)
class Schedule:
    """How to sample: a scheduler by name (None: the pipeline's own) and a number of steps.

    ``max_sequence_length`` is that of SD3's third text encoder, which others do not have. ``size`` is height and width
    in pixels (None: what the denoiser was trained on).
    """

    steps: int
    scheduler: str | None = None
    max_sequence_length: int = 256
    size: tuple[int, int] | None = None

    @staticmethod
    def of(sampling: Sampling) -> Schedule:
        """A recipe's own."""
        return Schedule(sampling.steps, max_sequence_length=sampling.max_sequence_length)


class EngineComponent(ModelMixin):  # type: ignore[misc]  # diffusers is not typed
    """A denoiser that stands in a stock pipeline and asks a runner.

    A ``ModelMixin``, because diffusers silently drops other modules on ``save_pretrained`` where this one can refuse.
    It holds no weights; its device and dtype are those of the tensors around it, the runner's are its own affair.
    ``timesteps`` says which row a timestep is: looked up by its value in every call, so any scheduler that the rows
    cover may be put into the pipeline at any time. ``profile`` says which latents it takes where they may vary.
    """

    placement: Tensor

    def __init__(
        self,
        runner: Runner,
        config: Mapping[str, Any],
        timesteps: TimestepTable,
        profile: ShapeProfile | None = None,
    ) -> None:
        super().__init__()
        self.runner = runner
        self.timesteps = timesteps
        self.profile = profile
        self._config = FrozenDict(config)
        self._kind = kind_of_config(config)
        self._added_width = self._kind.added_width(dict(config))
        width = config.get("projection_class_embeddings_input_dim")
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))  # SDXL's pipeline looks there
        self.register_buffer("placement", torch.empty(0), persistent=False)

    @property
    def config(self) -> FrozenDict:
        """The denoiser's diffusers configuration."""
        return self._config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the pipeline works in."""
        return self.placement.dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline's tensors are."""
        return self.placement.device

    def _answer(
        self, sample: Tensor, timestep: Tensor | float, text: Tensor, conditions: Mapping[str, object]
    ) -> Tensor:
        taken = set(_ADDED) if self._added_width else set()
        asked = [name for name, value in conditions.items() if name not in taken and value is not None and value != {}]
        if asked:
            raise InputError(f"an engine's network is fixed, it cannot take {asked[0]}: merge it before you calibrate")
        self._check_size(sample)
        given = {"sample": sample.detach(), "encoder_hidden_states": text.detach()}
        if self._added_width:
            added = self._kind.added_cond(conditions)
            if added is None:
                raise InputError("this engine needs the pooled text that its own pipeline gives: use that pipeline")
            given[ADDED_COND] = added.detach()
        return self._asked(given, self._rows(timestep, len(sample)))

    def _asked(self, given: dict[str, Tensor], rows: NDArray[np.int64]) -> Tensor:
        """What the runner answers; on a GPU without a way through the host, where the runner takes tensors."""
        sample = given["sample"]
        if sample.is_cuda and isinstance(self.runner, TensorRunner):
            # its memory is written again in the next call
            answer = self.runner.infer_tensors(given | {"step_index": torch.from_numpy(rows)})[OUTPUT]
            return answer.to(sample.dtype, copy=True)
        arrays = {name: tensor.float().cpu().numpy() for name, tensor in given.items()}
        outputs = self.runner.infer(arrays | {"step_index": rows})
        return torch.from_numpy(outputs[OUTPUT]).to(sample.device, sample.dtype)

    def _rows(self, timestep: Tensor | float, batch: int) -> NDArray[np.int64]:
        values = timestep.detach().cpu().numpy() if isinstance(timestep, torch.Tensor) else np.asarray(timestep)
        rows = rows_of_timesteps(values, self.timesteps)
        if len(rows) not in {1, batch}:
            raise InputError(f"{len(rows)} timesteps for a batch of {batch}: give one, or one for each sample")
        return np.broadcast_to(rows, (batch,)).copy()

    def _check_size(self, sample: Tensor) -> None:
        if self.profile is not None and self.profile.height is not None:
            self.profile.check_latents(*sample.shape[2:])
            return
        wanted, given = latent_shape_of(dict(self.config)), tuple(sample.shape[1:])
        if given != wanted:
            raise InputError(f"this engine takes latents of {wanted}, got {given}: leave height and width out")

    def save_pretrained(self, *_args: object, **_options: object) -> NoReturn:
        """Refuses: an engine is an artifact of its own.

        Raises:
            InputError: always.
        """
        raise InputError("an engine is not saved with a pipeline: keep its folder, and save the base pipeline")

    def load_lora_adapter(self, *_args: object, **_options: object) -> NoReturn:
        """Refuses: an engine's weights are fixed.

        Raises:
            InputError: always.
        """
        raise InputError("an engine's weights are fixed, no LoRA can be loaded: fuse it before you calibrate")

    def _load_ip_adapter_weights(self, *_args: object, **_options: object) -> NoReturn:
        raise InputError("an engine's network is fixed, no IP-Adapter can be loaded")

    def enable_freeu(self, *_args: object, **_options: object) -> NoReturn:
        """Refuses: an engine's network is fixed.

        Raises:
            InputError: always.
        """
        raise InputError("an engine's network is fixed, FreeU cannot be switched on")


class EngineDenoiser(EngineComponent):
    """The component of pipelines that call a UNet."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *,
        return_dict: bool = True,
        **conditions: object,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """The network's raw output, in new memory, on the device and in the dtype of ``sample``.

        Args:
            sample: [batch, C, H, W] latents after ``scale_model_input``.
            timestep: the scheduler's value: a number, a scalar tensor or one of [batch].
            encoder_hidden_states: [batch, tokens, D] text states.
            return_dict: a record with ``sample``, or a tuple of one.
            conditions: everything else that a UNet takes: SDXL's ``added_cond_kwargs``; the rest is accepted only where
                it asks for nothing.

        Raises:
            InputError: a condition changes the network (LoRA scale, IP-Adapter, ControlNet, ...), a timestep is outside
                the table or has no row, or the latents have another size than the engine's.
        """
        result = self._answer(sample, timestep, encoder_hidden_states, conditions)
        return UNet2DConditionOutput(sample=result) if return_dict else (result,)


class EngineTransformer(EngineComponent):
    """The component of pipelines of Stable Diffusion 3, which call a transformer."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        *,
        return_dict: bool = True,
        **conditions: object,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The network's raw output, in new memory, on the device and in the dtype of ``hidden_states``.

        Args:
            hidden_states: [batch, C, H, W] latents.
            encoder_hidden_states: [batch, tokens, D] joint text states.
            pooled_projections: [batch, A] pooled text.
            timestep: the scheduler's value, a scalar tensor or one of [batch].
            return_dict: a record with ``sample``, or a tuple of one.
            conditions: everything else that a transformer takes; accepted only where it asks for nothing.

        Raises:
            InputError: as :meth:`EngineDenoiser.forward`.
        """
        given = conditions | {"pooled_projections": pooled_projections}
        result = self._answer(hidden_states, timestep, encoder_hidden_states, given)
        return Transformer2DModelOutput(sample=result) if return_dict else (result,)


def engine_denoiser(
    runner: Runner, config: Mapping[str, Any], timesteps: TimestepTable, profile: ShapeProfile | None = None
) -> EngineDenoiser:
    """The component that stands where a network of that configuration stood."""
    kind = EngineTransformer if kind_of_config(config).component == "transformer" else EngineDenoiser
    return kind(runner, config, timesteps, profile)


def denoiser_from_engine(engine: Engine, runner: BoundRunner) -> EngineComponent:
    """The denoiser of a loaded engine, with the rows that ``runner`` is bound to."""
    return engine_denoiser(runner, engine.denoiser_config, runner.timesteps, runner.profile)


def pipeline_with_engine(base: DiffusionPipeline, engine: Engine, runner: BoundRunner) -> DiffusionPipeline:
    """``base`` with a loaded engine as its denoiser. ``base`` stays as it is.

    Schedules with fractional timesteps must have been named when the engine was loaded::

        timesteps = timesteps_of(base, Schedule(20, "euler-karras"))
        pipe = pipeline_with_engine(base, engine, load_engine(engine, schedules=[timesteps]))
    """
    return with_denoiser(base, denoiser_from_engine(engine, runner))


def with_schedule(pipe: DiffusionPipeline, schedule: Schedule) -> DiffusionPipeline:
    """``pipe`` with a fresh scheduler of the asked kind, made from the noise schedule of its own.

    Raises:
        InputError: there is no scheduler of that name.
    """
    other = with_denoiser(pipe, denoiser_of(pipe))
    if schedule.scheduler is not None:
        other.scheduler = scheduler_by_name(schedule.scheduler, pipe.scheduler.config)
    return other


def timesteps_of(pipe: DiffusionPipeline, schedule: Schedule) -> NDArray[np.float64]:
    """Every timestep that ``pipe`` asks its denoiser for on a schedule, float64 [calls], in order.

    Raises:
        InputError: there is no scheduler of that name, or it has no such number of steps.
    """
    scheduler = with_schedule(pipe, schedule).scheduler
    try:
        scheduler.set_timesteps(schedule.steps)
    except ValueError as error:
        raise InputError(f"{type(scheduler).__name__} has no {schedule.steps} steps: {error}") from error
    timesteps: NDArray[np.float64] = scheduler.timesteps.double().numpy()
    return timesteps


def initial_noise(
    seeds: Sequence[int], denoiser_config: Mapping[str, Any], size: tuple[int, int] | None = None
) -> Tensor:
    """Standard normal noise float32 [n, C, H, W]; each sample depends on its own seed alone.

    ``size`` is H and W (None: what the denoiser was trained on).
    """
    channels, *trained = latent_shape_of(dict(denoiser_config))
    shape = (1, channels, *(size or trained))
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def generate(
    pipe: DiffusionPipeline, prompt: Prompt, *, schedule: Schedule, guidance_scale: float, seed: int | None = None
) -> Image:
    """One picture; its noise comes from ``seed``, or from the prompt's id.

    Raises:
        InputError: no such scheduler, the engine's table does not cover the schedule, or it does not take the size.
    """
    seeds = [prompt.noise_seed if seed is None else seed]
    noise = initial_noise(seeds, denoiser_of(pipe).config, latent_size(pipe, schedule))
    given = call_arguments(pipe, [prompt], schedule, guidance_scale)
    picture: Image = with_schedule(pipe, schedule)(**given, latents=noise.to(denoiser_of(pipe).dtype)).images[0]
    return picture


def picture_size(pipe: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int] | None:
    """Height and width in pixels; one that is None is what the denoiser was trained on, as both are where both are."""
    if height is None and width is None:
        return None
    factor = pipe.vae_scale_factor
    _, *trained = latent_shape_of(dict(denoiser_of(pipe).config))
    return height or factor * trained[0], width or factor * trained[1]


def latent_size(pipe: DiffusionPipeline, schedule: Schedule) -> tuple[int, int] | None:
    """Height and width of the latents of a schedule's pictures; None for what the denoiser was trained on.

    Raises:
        InputError: a size in pixels is no multiple of what the autoencoder makes of one latent.
    """
    if schedule.size is None:
        return None
    height, width = schedule.size
    factor = pipe.vae_scale_factor
    if height % factor or width % factor:
        raise InputError(f"a picture of {height}x{width} pixels: height and width must be multiples of {factor}")
    return height // factor, width // factor


def call_arguments(
    pipe: DiffusionPipeline, prompts: Sequence[Prompt], schedule: Schedule, guidance_scale: float
) -> dict[str, Any]:
    """What a stock pipeline is called with to draw ``prompts``.

    Where no prompt has a negative one, none is given: SDXL takes zeros then, not the states of an empty text.
    """
    negatives = [prompt.negative for prompt in prompts]
    pads = isinstance(pipe, StableDiffusion3Pipeline)
    own = {"max_sequence_length": schedule.max_sequence_length} if pads else {}
    if schedule.size is not None:
        own |= {"height": schedule.size[0], "width": schedule.size[1]}
    return own | {
        "prompt": [prompt.text for prompt in prompts],
        "negative_prompt": negatives if any(negatives) else None,
        "num_inference_steps": schedule.steps,
        "guidance_scale": guidance_scale,
    }
