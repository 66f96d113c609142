"""The engine as a component of a stock diffusers pipeline: it stands where the UNet stood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from diffusers import ModelMixin, StableDiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from s2p_deploy.engines.runner import OUTPUT
from s2p_deploy.engines.tensor_runner import TensorRunner
from s2p_deploy.errors import InputError
from s2p_deploy.schedulers import scheduler_by_name
from s2p_deploy.timesteps import rows_of_timesteps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from s2p_deploy.engines import BoundRunner, Runner
    from s2p_deploy.records import Engine, Prompt, TimestepTable


@dataclass(frozen=True)
class Schedule:
    """How to sample: a scheduler by name (None: the pipeline's own) and a number of steps."""

    steps: int
    scheduler: str | None = None


class EngineDenoiser(ModelMixin):  # type: ignore[misc]  # diffusers is not typed
    """A denoiser that a stock pipeline calls like its UNet, and that asks a runner.

    A ``ModelMixin``, because diffusers silently drops other modules on ``save_pretrained`` where this one can refuse.
    It holds no weights; its device and dtype are those of the tensors around it, the runner's are its own affair.
    ``timesteps`` says which row a timestep is: looked up by its value in every call, so any scheduler that the rows
    cover may be put into the pipeline at any time.
    """

    placement: Tensor

    def __init__(self, runner: Runner, config: Mapping[str, Any], timesteps: TimestepTable) -> None:
        super().__init__()
        self.runner = runner
        self.timesteps = timesteps
        self._config = FrozenDict(config)
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
            conditions: everything else that a UNet takes; accepted only where it asks for nothing.

        Raises:
            InputError: a condition changes the network (LoRA scale, IP-Adapter, ControlNet, ...), a timestep is outside
                the table or has no row, or the latents have another size than the engine's.
        """
        asked = [name for name, value in conditions.items() if value is not None and value != {}]
        if asked:
            raise InputError(f"an engine's network is fixed, it cannot take {asked[0]}: merge it before you calibrate")
        self._check_size(sample)
        result = self._asked(sample.detach(), self._rows(timestep, len(sample)), encoder_hidden_states.detach())
        return UNet2DConditionOutput(sample=result) if return_dict else (result,)

    def _asked(self, sample: Tensor, rows: NDArray[np.int64], text: Tensor) -> Tensor:
        """What the runner answers; on a GPU without a way through the host, where the runner takes tensors."""
        if sample.is_cuda and isinstance(self.runner, TensorRunner):
            given = {"sample": sample, "step_index": torch.from_numpy(rows), "encoder_hidden_states": text}
            # its memory is written again in the next call
            return self.runner.infer_tensors(given)[OUTPUT].to(sample.dtype, copy=True)
        outputs = self.runner.infer(
            {
                "sample": sample.float().cpu().numpy(),
                "step_index": rows,
                "encoder_hidden_states": text.float().cpu().numpy(),
            }
        )
        return torch.from_numpy(outputs[OUTPUT]).to(sample.device, sample.dtype)

    def _rows(self, timestep: Tensor | float, batch: int) -> NDArray[np.int64]:
        values = timestep.detach().cpu().numpy() if isinstance(timestep, torch.Tensor) else np.asarray(timestep)
        rows = rows_of_timesteps(values, self.timesteps)
        if len(rows) not in {1, batch}:
            raise InputError(f"{len(rows)} timesteps for a batch of {batch}: give one, or one for each sample")
        return np.broadcast_to(rows, (batch,)).copy()

    def _check_size(self, sample: Tensor) -> None:
        size = self.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        wanted, given = (self.config["in_channels"], height, width), tuple(sample.shape[1:])
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


def denoiser_from_engine(engine: Engine, runner: BoundRunner) -> EngineDenoiser:
    """The denoiser of a loaded engine, with the rows that ``runner`` is bound to."""
    return EngineDenoiser(runner, engine.denoiser_config, runner.timesteps)


def pipeline_with_denoiser(base: StableDiffusionPipeline, denoiser: torch.nn.Module) -> StableDiffusionPipeline:
    """A stock pipeline that shares all of ``base`` but the denoiser and the scheduler (it has a state)."""
    scheduler = type(base.scheduler).from_config(base.scheduler.config)
    components = base.components | {"unet": denoiser, "scheduler": scheduler}
    pipe = StableDiffusionPipeline(**components, requires_safety_checker=base.config.requires_safety_checker)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_with_engine(
    base: StableDiffusionPipeline, engine: Engine, runner: BoundRunner
) -> StableDiffusionPipeline:
    """``base`` with a loaded engine as its denoiser. ``base`` stays as it is.

    Schedules with fractional timesteps must have been named when the engine was loaded::

        timesteps = timesteps_of(base, Schedule(20, "euler-karras"))
        pipe = pipeline_with_engine(base, engine, load_engine(engine, schedules=[timesteps]))
    """
    return pipeline_with_denoiser(base, denoiser_from_engine(engine, runner))


def with_schedule(pipe: StableDiffusionPipeline, schedule: Schedule) -> StableDiffusionPipeline:
    """``pipe`` with a fresh scheduler of the asked kind, made from the noise schedule of its own.

    Raises:
        InputError: there is no scheduler of that name.
    """
    other = pipeline_with_denoiser(pipe, pipe.unet)
    if schedule.scheduler is not None:
        other.scheduler = scheduler_by_name(schedule.scheduler, pipe.scheduler.config)
    return other


def timesteps_of(pipe: StableDiffusionPipeline, schedule: Schedule) -> NDArray[np.float64]:
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


def initial_noise(seeds: Sequence[int], denoiser_config: Mapping[str, Any]) -> Tensor:
    """Standard normal noise float32 [n, C, H, W]; each sample depends on its own seed alone."""
    size = denoiser_config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    shape = (1, denoiser_config["in_channels"], height, width)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def generate(
    pipe: StableDiffusionPipeline, prompt: Prompt, *, schedule: Schedule, guidance_scale: float, seed: int | None = None
) -> Image:
    """One picture; its noise comes from ``seed``, or from the prompt's id.

    Raises:
        InputError: no such scheduler, or the engine's table does not cover the schedule.
    """
    noise = initial_noise([prompt.noise_seed if seed is None else seed], pipe.unet.config)
    result = with_schedule(pipe, schedule)(
        prompt.text,
        negative_prompt=prompt.negative,
        latents=noise.to(pipe.unet.dtype),
        num_inference_steps=schedule.steps,
        guidance_scale=guidance_scale,
    )
    picture: Image = result.images[0]
    return picture
