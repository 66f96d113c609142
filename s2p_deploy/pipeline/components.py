"""Components of a stock diffusers pipeline that compute on engines: denoiser, text encoders and autoencoder."""

from __future__ import annotations

from copy import copy
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import ModelMixin  # noqa: F401  # diffusers looks for it beside the classes that it loads
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from s2p_deploy.engines import load_engine
from s2p_deploy.engines.component_engines import copy_networks, load_component_engines
from s2p_deploy.engines.options import shape_at
from s2p_deploy.engines.runner import ADDED_COND, OUTPUT, TensorRunner
from s2p_deploy.errors import InputError
from s2p_deploy.families import family_of_config
from s2p_deploy.families.components import AUTOENCODER, DECODER, ENCODER, LAYERS, POOLED, STATES, pixels_per_latent
from s2p_deploy.families.layers import sample_shape_of
from s2p_deploy.families.model_family import guidance_width
from s2p_deploy.pipeline.denoiser_loras import ComponentWithLoras, DenoiserLoras
from s2p_deploy.pipeline.engine_component import EngineComponent
from s2p_deploy.pipeline.image_prompts import TakesImagePrompts
from s2p_deploy.records import ComponentEngines, Engine, open_artifact, read_manifest
from s2p_deploy.records.artifacts import MANIFEST, copy_artifact, verify_whole
from s2p_deploy.records.optional_inputs import LORA_STRENGTHS, is_residual
from s2p_deploy.timesteps import timestep_indices

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.engines import BoundRunner, Runner, ShapeProfile
    from s2p_deploy.engines.lora_bank import LoraBank
    from s2p_deploy.records import TensorSpec, TimestepTable
    from s2p_deploy.records.optional_inputs import ImageSlots
    from s2p_deploy.timesteps import Timesteps

    Indices = Callable[[Timesteps], NDArray[np.int64]]

_ADDED = ("added_cond_kwargs", "pooled_projections")  # a pipeline's keywords for the added conditions
_GUIDANCE = "timestep_cond"  # the keyword for LCM's embedding of the guidance scale
_DOWN, _MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"
_BLOCKS = "block_controlnet_hidden_states"
_RESIDUALS = (_DOWN, _MIDDLE, _BLOCKS)  # the keywords for what a ControlNet gives
_PROJECTED = "CLIPTextModelWithProjection"


_ATTENTION = ("cross_attention_kwargs", "joint_attention_kwargs")  # a pipeline's keywords for its LoRAs' scale
_CONDITION_ADVICE = {
    "attention_mask": "leave the mask out, or use the floating-point pipeline",
    "encoder_attention_mask": "leave the mask out, or use the floating-point pipeline",
    **dict.fromkeys(_RESIDUALS, "for ControlNets, export with --controlnet and build again"),
}


def _asks_nothing(name: str, value: Any) -> bool:  # noqa: ANN401 - a condition of any kind
    """Returns whether a condition changes no prediction: it is empty, or masks nothing."""
    if name.endswith("attention_mask") and isinstance(value, torch.Tensor):
        return bool((value == 1).all())
    return value is None or value == {}


class EngineDenoiser(ComponentWithLoras):
    """A denoiser that computes on a runner.

    Args:
        runner: computes ``noise_pred`` from ``sample``, ``timestep_index`` and the conditions.
        config: diffusers' configuration of the network that the engine was made from.
        timesteps: the runner's timestep indices. Timesteps are looked up by their values in every call, so any
            scheduler whose timesteps the table covers may be put into the pipeline at any time.
        profile: the sizes of latents and texts that the runner takes (None: those that the network was trained on).
        engine: the engine on disk that the runner runs, if it is one.
        indices: looks timesteps up instead of ``timesteps``: an engine may have indices for further ones.
        bank: the engine's low-rank branches (None: it has none).
        optional: the inputs of adapters that the runner takes.
        images: what of image prompts it takes (None: nothing).
    """

    def __init__(  # noqa: PLR0913 - what a runner needs, and options by keyword
        self,
        runner: Runner,
        config: Mapping[str, Any],
        timesteps: TimestepTable,
        profile: ShapeProfile | None = None,
        *,
        engine: Engine | None = None,
        indices: Indices | None = None,
        bank: LoraBank | None = None,
        optional: tuple[TensorSpec, ...] = (),
        images: ImageSlots | None = None,
    ) -> None:
        super().__init__(config, DenoiserLoras(bank, config))
        self.runner = runner
        self.timesteps = timesteps
        self._indices: Indices = indices or partial(timestep_indices, table=timesteps)
        self.profile = profile
        self.engine = engine
        self.optional, self.images = optional, images
        self._family = family_of_config(config)
        self._added_width = self._family.added_width(dict(config))
        width = config.get("projection_class_embeddings_input_dim")
        # SDXL's pipeline reads the width of the added conditions there
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    @classmethod
    def load(cls, folder: Path, schedules: Sequence[Timesteps] = (), device: str = "auto") -> EngineDenoiser:
        """Loads the denoiser of an engine on disk, verified and with its scales bound.

        Args:
            folder: the engine.
            schedules: timesteps of schedules that will be run, for which all is computed now.
            device: ``cuda:1`` and the like: the GPU of an engine that runs on one.

        Raises:
            InputError, IntegrityError, MissingEnvironmentError: as :func:`s2p_deploy.engines.load_engine`.
        """
        engine = Engine.open(folder)
        return denoiser_from_engine(engine, load_engine(engine, schedules=schedules, device=device))

    def save(self, folder: Path) -> None:
        """Copies the engine to ``folder``, which must not exist, byte by byte: digest and signature stay valid.

        Raises:
            InputError: ``folder`` exists, its disk has no room, or the runner is of no engine on disk.
            IntegrityError: the engine was changed since it was opened.
        """
        copy_artifact(self.saved_engine(), folder)

    def is_saved_in(self, folder: Path) -> bool:
        """Returns whether ``folder`` holds this engine. Raises IntegrityError where that was changed."""
        if not (folder / MANIFEST).exists() or read_manifest(folder, "Engine") != self.saved_engine().manifest:
            return False
        verify_whole(folder, self.saved_engine().manifest)
        return True

    @classmethod
    def opened(cls, folder: Path) -> EngineDenoiser:
        """Opens an engine; raises as :meth:`load`."""
        return cls.load(folder)

    def saved_engine(self) -> Engine:
        """Returns the engine on disk.

        Raises:
            InputError: the runner is of none.
        """
        if self.engine is None:
            raise InputError("this denoiser is not that of an engine on disk: save one that open_pipeline opened")
        return self.engine

    def prepare(self, timesteps: Timesteps) -> None:
        """Computes together what the engine needs at the timesteps of a schedule, unless it has that already.

        Raises:
            InputError: a timestep is outside the table, or has no index.
        """
        self._indices(timesteps)

    def close(self) -> None:
        """Closes the runner, which copies of this component share."""
        self.runner.close()

    def __copy__(self) -> EngineDenoiser:
        copied = type(self)(
            self.runner,
            self._config,
            self.timesteps,
            self.profile,
            engine=self.engine,
            indices=self._indices,
            optional=self.optional,
            images=self.images,
        )
        copied.loras = self.loras
        return copied.place(self.device, self.dtype)

    def __deepcopy__(self, _memo: dict[int, object]) -> EngineDenoiser:
        copied = copy(self)
        copied.loras = self.loras.copy()
        return copied

    @property
    def takes_residuals(self) -> bool:
        """Returns whether the runner takes a ControlNet's residuals."""
        return any(is_residual(spec.name) for spec in self.optional)

    def _residuals(self, sample: Tensor, conditions: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns a ControlNet's residuals by the names of the runner's inputs; none where the pipeline has no such."""
        raise NotImplementedError

    def _predict(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor,
        conditions: Mapping[str, object],
        images: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        taken = set(_ADDED) if self._added_width else set()
        if guidance_width(dict(self.config)):
            taken.add(_GUIDANCE)
        attention: dict[str, Any] = {}
        for name in _ATTENTION:
            given = conditions.get(name)
            if isinstance(given, dict):
                attention |= given
                taken.add(name)
        if self.takes_residuals:
            taken |= set(_RESIDUALS)
        refused = [name for name, value in conditions.items() if name not in taken and not _asks_nothing(name, value)]
        if refused:
            advice = _CONDITION_ADVICE.get(refused[0], "use the floating-point pipeline")
            raise InputError(f"an engine's network is fixed, it cannot take {refused[0]}: {advice}")
        self._check_size(sample)
        if self.profile is not None:
            self.profile.check_tokens(text.shape[1])
        inputs = {"sample": sample.detach(), "encoder_hidden_states": text.detach(), **(images or {})}
        inputs |= self._residuals(sample, conditions)
        if self._added_width:
            added = self._family.added_cond(conditions)
            if added is None or added.shape[1] != self._added_width:
                what = "the embedded guidance scale" if guidance_width(dict(self.config)) else "the pooled text"
                raise InputError(f"this engine needs {what} that its own pipeline gives: use that pipeline")
            inputs[ADDED_COND] = added.detach()
        strengths = self.loras.strengths(attention, sample)
        if strengths is not None:
            inputs[LORA_STRENGTHS] = torch.from_numpy(strengths)
        prediction: Tensor = self._infer(inputs, self._timestep_indices(timestep, len(sample)))
        return prediction

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # there is nothing to compile in an engine
    def _infer(self, inputs: dict[str, Tensor], indices: NDArray[np.int64]) -> Tensor:
        """Runs the runner; tensors on a device stay there where the runner takes tensors."""
        sample = inputs["sample"]
        if sample.device.type != "cpu" and isinstance(self.runner, TensorRunner):
            output = self.runner.infer_tensors(inputs | {"timestep_index": torch.from_numpy(indices)})[OUTPUT]
            return output.to(sample.device, sample.dtype, copy=True)  # the runner writes there again in the next call
        arrays = {name: tensor.float().cpu().numpy() for name, tensor in inputs.items()}
        outputs = self.runner.infer(arrays | {"timestep_index": indices})
        return torch.from_numpy(outputs[OUTPUT]).to(sample.device, sample.dtype)

    def _timestep_indices(self, timestep: Tensor | float, batch: int) -> NDArray[np.int64]:
        values = timestep.detach().cpu().numpy() if isinstance(timestep, torch.Tensor) else np.asarray(timestep)
        indices = self._indices(values)
        if len(indices) not in {1, batch}:
            raise InputError(f"{len(indices)} timesteps for a batch of {batch}: give one, or one for each sample")
        return np.broadcast_to(indices, (batch,)).copy()

    def _check_size(self, sample: Tensor) -> None:
        if self.profile is not None and self.profile.height is not None:
            self.profile.check_latents(*sample.shape[2:])
            return
        expected, given = sample_shape_of(dict(self.config)), tuple(sample.shape[1:])
        if given != expected:
            raise InputError(
                f"this engine takes latents of {expected}, got {given}: leave height and width out, or give latents of"
                " that size"
            )


class EngineUNet(TakesImagePrompts, EngineDenoiser):
    """The denoiser of pipelines that call a UNet; arguments as :class:`EngineDenoiser`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - a denoiser's
        super().__init__(*arguments, **options)
        self.ip_adapters = self.prompted = None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *,
        return_dict: bool = True,
        **conditions: object,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predicts the network's raw output, in new memory, on the device and in the dtype of ``sample``.

        Args:
            sample: [batch, C, H, W] latents after ``scale_model_input``.
            timestep: the scheduler's value: a number, a scalar tensor or one of [batch].
            encoder_hidden_states: [batch, tokens, D] text states.
            return_dict: returns a record with ``sample`` instead of a tuple of one.
            conditions: everything else that a UNet takes: SDXL's ``added_cond_kwargs``, an IP-Adapter's in them, and
                a ControlNet's residuals where the engine has inputs for them; the rest is accepted only where it is
                None or empty.

        Raises:
            InputError: a condition changes the network (LoRA scale, ...), or is of another adapter, a timestep is
                outside the table or has no index, or the latents have another size, or the text another number of
                tokens, than the engine takes.
        """
        rest, images = self.image_inputs(conditions, sample)
        result = self._predict(sample, timestep, encoder_hidden_states, rest, images)
        return UNet2DConditionOutput(sample=result) if return_dict else (result,)

    def _residuals(self, sample: Tensor, conditions: Mapping[str, Any]) -> dict[str, Tensor]:
        down, middle = conditions.get(_DOWN), conditions.get(_MIDDLE)
        if down is None and middle is None:
            return {}
        names = [spec.name for spec in self.optional if is_residual(spec.name)]
        if down is None or middle is None or len(down) + 1 != len(names):
            given = 0 if down is None else len(down)
            raise InputError(
                f"this engine takes {len(names) - 1} residuals of a ControlNet's down blocks and one of its middle"
                f" block, got {given} and {int(middle is not None)}: use a ControlNet for this kind of network"
            )
        sizes = {"batch": len(sample), "height": sample.shape[2], "width": sample.shape[3]}
        shapes = {spec.name: shape_at(spec, sizes) for spec in self.optional if spec.name in names}
        return {name: _spread(value, shapes[name]) for name, value in zip(names, (*down, middle), strict=True)}


class EngineTransformer(EngineDenoiser):
    """The denoiser of pipelines of Stable Diffusion 3, which call a transformer."""

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
        """Predicts the network's raw output, in new memory, on the device and in the dtype of ``hidden_states``.

        Args:
            hidden_states: [batch, C, H, W] latents.
            encoder_hidden_states: [batch, tokens, D] joint text states.
            pooled_projections: [batch, A] pooled text.
            timestep: the scheduler's value, a scalar tensor or one of [batch].
            return_dict: returns a record with ``sample`` instead of a tuple of one.
            conditions: everything else that a transformer takes: a ControlNet's residuals where the engine has inputs
                for them; the rest is accepted only where it is None or empty.

        Raises:
            InputError: as :meth:`EngineUNet.forward`.
        """
        given = conditions | {"pooled_projections": pooled_projections}
        result = self._predict(hidden_states, timestep, encoder_hidden_states, given)
        return Transformer2DModelOutput(sample=result) if return_dict else (result,)

    def _residuals(self, sample: Tensor, conditions: Mapping[str, Any]) -> dict[str, Tensor]:
        """Gives every block the residual that diffusers adds behind it: a ControlNet may have fewer blocks."""
        given = conditions.get(_BLOCKS)
        if not given:
            return {}
        names = [spec.name for spec in self.optional if is_residual(spec.name)]
        blocks, patch = len(names) + 1, self.config["patch_size"]  # behind the last one nothing is added
        sides = (sample.shape[2] // patch, sample.shape[3] // patch)
        chosen = (given[int(number / (blocks / len(given)))] for number in range(len(names)))
        return {name: value.detach().unflatten(1, sides) for name, value in zip(names, chosen, strict=True)}


def _spread(residual: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Gives one number per channel, of a ControlNet that pools its residuals, all places."""
    pooled = residual.shape[2:] == (1, 1)
    return residual.detach().expand(*residual.shape[:2], *shape[2:]) if pooled else residual.detach()


def engine_denoiser(  # noqa: PLR0913 - as the class
    runner: Runner,
    config: Mapping[str, Any],
    timesteps: TimestepTable,
    profile: ShapeProfile | None = None,
    *,
    engine: Engine | None = None,
    indices: Indices | None = None,
    bank: LoraBank | None = None,
    optional: tuple[TensorSpec, ...] = (),
    images: ImageSlots | None = None,
) -> EngineDenoiser:
    """Makes the component that replaces a network of that configuration; arguments as :class:`EngineDenoiser`."""
    component = EngineTransformer if family_of_config(config).component == "transformer" else EngineUNet
    return component(
        runner,
        config,
        timesteps,
        profile,
        engine=engine,
        indices=indices,
        bank=bank,
        optional=optional,
        images=images,
    )


def denoiser_from_engine(engine: Engine, runner: BoundRunner) -> EngineDenoiser:
    """Makes the denoiser of a loaded engine, with the timesteps that ``runner`` is bound to or can compute."""
    return engine_denoiser(
        runner,
        engine.denoiser_config,
        runner.timesteps,
        runner.profile,
        engine=engine,
        indices=runner.indices,
        bank=runner.loras,
        optional=runner.optional,
        images=runner.images,
    )


class AuxiliaryComponent(EngineComponent):
    """A text encoder or autoencoder that computes on runners.

    Args:
        runners: of its networks, by name.
        config: of the network that it replaces.
        engines: the component engines on disk that the runners are of.
    """

    def __init__(self, runners: Mapping[str, Runner], config: Mapping[str, Any], engines: ComponentEngines) -> None:
        super().__init__(config)
        self.runners, self.engines = dict(runners), engines
        self.most: int | None = None  # samples per run, besides the engine's own largest batch

    def close(self) -> None:
        """Closes the runners, which copies of this component share."""
        for runner in self.runners.values():
            runner.close()

    def save(self, folder: Path) -> None:
        """Writes an artifact of the component's own networks, copied byte by byte, to ``folder``, which must not exist.

        Raises:
            InputError: ``folder`` exists, or its disk has no room. IntegrityError: a file was changed.
        """
        copy_networks(self.engines, tuple(self.runners), folder)

    def is_saved_in(self, folder: Path) -> bool:
        """Returns whether ``folder`` holds the component's networks. Raises IntegrityError where they were changed."""
        files = [file for name in self.runners for file in self.engines.networks[name].files]
        own = {file: self.engines.manifest.files[file] for file in files}
        return (folder / MANIFEST).exists() and open_artifact(folder, "ComponentEngines").files == own

    @classmethod
    def opened(cls, folder: Path) -> AuxiliaryComponent:
        """Opens the networks of one component; raises as :func:`auxiliary_components`."""
        loaded = auxiliary_components(ComponentEngines.open(folder))
        if len(loaded) != 1:
            raise InputError(f"{folder} has the engines of {len(loaded)} components: give them to open_pipeline")
        return next(iter(loaded.values()))

    def __deepcopy__(self, _memo: dict[int, object]) -> AuxiliaryComponent:
        copied = type(self)(self.runners, self._config, self.engines).place(self.device, self.dtype)
        copied.most = self.most
        return copied

    def _infer(self, network: str, name: str, value: Tensor) -> dict[str, Tensor]:
        """Runs a network, in slices where the batch is above its engine's largest.

        The outputs are on the device of ``value`` and in the dtype of the pipeline's tensors.
        """
        largest = len(value) if self.engines.profile is None else self.engines.profile.maximum
        slices = [self._infer_slice(network, name, part) for part in value.detach().split(self.most or largest)]
        if len(slices) == 1:
            return slices[0]
        specs = self.engines.networks[network].outputs
        return {spec.name: torch.cat([one[spec.name] for one in slices], spec.shape.index("batch")) for spec in specs}

    def _infer_slice(self, network: str, name: str, value: Tensor) -> dict[str, Tensor]:
        runner = self.runners[network]
        if value.device.type != "cpu" and isinstance(runner, TensorRunner):
            # copied: the runner writes its memory again in the next call
            outputs = runner.infer_tensors({name: value})
            return {key: output.to(value.device, self.dtype, copy=True) for key, output in outputs.items()}
        host = value.cpu()
        dtype = self.engines.networks[network].input.dtype
        array = np.ascontiguousarray((host.float() if host.is_floating_point() else host.long()).numpy(), dtype)
        return {
            key: torch.from_numpy(output).to(value.device, self.dtype)
            for key, output in runner.infer({name: array}).items()
        }


class EngineTextEncoder(AuxiliaryComponent):
    """Replaces a CLIP text encoder, with projection or without, or T5's encoder."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # there is nothing to compile
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **conditions: object,
    ) -> Any:  # noqa: ANN401 - transformers' own record of that encoder, or a tuple
        """Encodes tokens as transformers' encoder does, to its own record.

        Args:
            input_ids: int64 [batch, tokens].
            attention_mask: [batch, tokens], all ones: the networks read every token, as diffusers' pipelines have it.
            output_hidden_states: returns the states of every layer too (CLIP's only).
            return_dict: returns a record instead of a tuple of its members.
            conditions: everything else; accepted only where it is empty.

        Raises:
            InputError: a token is masked, the encoder takes another number of tokens, or cannot take a condition.
        """
        refused = [name for name, value in conditions.items() if value]
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            refused.append("a mask")
        if refused:
            raise InputError(f"this text encoder cannot take {refused[0]}: use PyTorch's text encoder")
        (name,) = self.runners
        tokens = self.engines.networks[name].input.shape[1]
        if isinstance(tokens, int) and input_ids.shape[1] != tokens:
            raise InputError(
                f"this text encoder takes {tokens} tokens, got {input_ids.shape[1]}: pad them, or use PyTorch's"
                " text encoder"
            )
        outputs = self._infer(name, "input_ids", input_ids)
        if output_hidden_states and LAYERS not in outputs:
            raise InputError("this text encoder gives its last states alone: leave output_hidden_states off")
        layers = tuple(outputs[LAYERS]) if output_hidden_states else None
        states, pooled = outputs[STATES], outputs.get(POOLED)
        if pooled is None:
            record = BaseModelOutput(last_hidden_state=states)
        elif _PROJECTED in (self.config.get("architectures") or ()):
            record = CLIPTextModelOutput(text_embeds=pooled, last_hidden_state=states, hidden_states=layers)
        else:
            record = BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled, hidden_states=layers)
        return record if return_dict else record.to_tuple()


class EngineAutoencoder(AuxiliaryComponent):
    """Replaces an ``AutoencoderKL``. It computes in its own precision whatever the pipeline's dtype is."""

    def __init__(self, runners: Mapping[str, Runner], config: Mapping[str, Any], engines: ComponentEngines) -> None:
        # SDXL's pipeline would cast the network's weights to float32, which there are none of
        super().__init__(runners, dict(config) | {"force_upcast": False}, engines)

    def enable_slicing(self) -> None:
        """Computes one picture at a time from now on, which takes less memory."""
        self.most = 1

    def disable_slicing(self) -> None:
        """Computes as many pictures at a time as the engine takes."""
        self.most = None

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:  # noqa: ANN401 - as AutoencoderKL's
        """Encodes pictures [batch, 3, factor * H, factor * W] to the distribution of their latents [batch, C, H, W].

        Raises:
            InputError: the engine does not take pictures of that size.
        """
        factor = pixels_per_latent(self.config)
        self._check_latents(x.shape[2] // factor, x.shape[3] // factor)
        distribution = DiagonalGaussianDistribution(self._infer(ENCODER, "image", x)["moments"])
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> Any:  # noqa: ANN401
        """Decodes latents [batch, C, H, W] to pictures [batch, 3, factor * H, factor * W].

        ``generator`` is not used: an ``AutoencoderKL`` takes one and does not use it either.

        Raises:
            InputError: the engine does not take latents of that size.
        """
        self._check_latents(*z.shape[2:])
        picture = self._infer(DECODER, "latents", z)["image"]
        return DecoderOutput(sample=picture) if return_dict else (picture,)

    def _check_latents(self, height: int, width: int) -> None:
        if self.engines.profile is not None:
            self.engines.profile.check_latents(height, width)


def auxiliary_components(
    engines: ComponentEngines, runners: Mapping[str, Runner] | None = None, *, device: str = "auto"
) -> dict[str, AuxiliaryComponent]:
    """Loads component engines, unless their ``runners`` are loaded; returns components by their names in a pipeline.

    ``device`` is a context's, as for :func:`s2p_deploy.engines.load_engine`.

    Raises:
        IntegrityError, MissingEnvironmentError: as :func:`s2p_deploy.engines.component_engines.load_component_engines`.
    """
    loaded = load_component_engines(engines, device) if runners is None else dict(runners)
    halves = {name: loaded.pop(name) for name in (DECODER, ENCODER) if name in loaded}
    components: dict[str, AuxiliaryComponent] = {
        name: EngineTextEncoder({name: runner}, engines.networks[name].config, engines)
        for name, runner in loaded.items()
    }
    if halves:
        components[AUTOENCODER] = EngineAutoencoder(halves, engines.networks[DECODER].config, engines)
    return components
