"""The engine as a component of a stock diffusers pipeline: it stands where the denoiser stood."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from s2p_deploy.engines import load_engine
from s2p_deploy.engines.runner import ADDED_COND, OUTPUT
from s2p_deploy.engines.tensor_runner import TensorRunner
from s2p_deploy.errors import InputError
from s2p_deploy.families import kind_of_config, latent_shape_of
from s2p_deploy.pipeline.placed import PlacedComponent
from s2p_deploy.records import Engine
from s2p_deploy.records.copied import copy_artifact
from s2p_deploy.timesteps import rows_of_timesteps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.engines import BoundRunner, Runner, ShapeProfile
    from s2p_deploy.records import TimestepTable
    from s2p_deploy.timesteps import Timesteps


_ADDED = ("added_cond_kwargs", "pooled_projections")  # what carries the added conditions


class EngineComponent(PlacedComponent):
    """A denoiser that stands in a stock pipeline and asks a runner.

    ``timesteps`` says which row a timestep is: looked up by its value in every call, so any scheduler that the rows
    cover may be put into the pipeline at any time. ``profile`` says which latents it takes where they may vary.
    ``engine`` is what the runner runs, where that is an engine on disk. A copy asks the same runner.
    """

    def __init__(
        self,
        runner: Runner,
        config: Mapping[str, Any],
        timesteps: TimestepTable,
        profile: ShapeProfile | None = None,
        *,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(config)
        self.runner = runner
        self.timesteps = timesteps
        self.profile = profile
        self.engine = engine
        self._kind = kind_of_config(config)
        self._added_width = self._kind.added_width(dict(config))
        width = config.get("projection_class_embeddings_input_dim")
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))  # SDXL's pipeline looks there

    @classmethod
    def load(cls, folder: Path, schedules: Sequence[Timesteps] = ()) -> EngineComponent:
        """The denoiser of an engine on disk, verified and with its scales bound.

        Args:
            folder: the engine.
            schedules: timesteps of every schedule that will be asked for; fractional ones must be named here.

        Raises:
            InputError, IntegrityError, MissingEnvironmentError: as :func:`s2p_deploy.engines.load_engine`.
        """
        engine = Engine.open(folder)
        return denoiser_from_engine(engine, load_engine(engine, schedules=schedules))

    def save(self, folder: Path) -> None:
        """Copies the engine to ``folder``, which must not exist, byte by byte: digest and signature stay valid.

        Raises:
            InputError: ``folder`` exists, its disk has no room, or the runner is of no engine on disk.
            IntegrityError: the engine was changed since it was opened.
        """
        copy_artifact(self.saved_engine(), folder)

    def saved_engine(self) -> Engine:
        """The engine on disk. Raises InputError where the runner is of none."""
        if self.engine is None:
            raise InputError("this denoiser is not that of an engine on disk: there is nothing to save")
        return self.engine

    def close(self) -> None:
        """Closes the runner, which copies of this component ask too."""
        self.runner.close()

    def __deepcopy__(self, _memo: dict[int, object]) -> EngineComponent:
        copied = type(self)(self.runner, self._config, self.timesteps, self.profile, engine=self.engine)
        return copied.placed_like(self)

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
        answer: Tensor = self._asked(given, self._rows(timestep, len(sample)))
        return answer

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # there is nothing to compile in an engine
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
    runner: Runner,
    config: Mapping[str, Any],
    timesteps: TimestepTable,
    profile: ShapeProfile | None = None,
    *,
    engine: Engine | None = None,
) -> EngineComponent:
    """The component that stands where a network of that configuration stood."""
    kind = EngineTransformer if kind_of_config(config).component == "transformer" else EngineDenoiser
    return kind(runner, config, timesteps, profile, engine=engine)


def denoiser_from_engine(engine: Engine, runner: BoundRunner) -> EngineComponent:
    """The denoiser of a loaded engine, with the rows that ``runner`` is bound to."""
    return engine_denoiser(runner, engine.denoiser_config, runner.timesteps, runner.profile, engine=engine)
