"""Text encoders and autoencoder that ask a runner, where a pipeline's own networks stood."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from s2p_deploy.engines.pipeline_parts import load_parts
from s2p_deploy.errors import InputError
from s2p_deploy.families.components import AUTOENCODER, DECODER, ENCODER, LAYERS, POOLED, STATES
from s2p_deploy.pipeline.placed import PlacedComponent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from s2p_deploy.engines import Runner
    from s2p_deploy.records.pipeline_parts import PipelineParts

_PROJECTED = "CLIPTextModelWithProjection"


class PartComponent(PlacedComponent):
    """A text encoder or autoencoder; ``parts`` is the artifact that its networks are of. A copy asks the same runners.

    ``runners`` are the networks', by name.
    """

    def __init__(self, runners: Mapping[str, Runner], config: Mapping[str, Any], parts: PipelineParts) -> None:
        super().__init__(config)
        self.runners, self.parts = dict(runners), parts

    def close(self) -> None:
        """Closes the runners, which copies of this component ask too."""
        for runner in self.runners.values():
            runner.close()

    def __deepcopy__(self, _memo: dict[int, object]) -> PartComponent:
        return type(self)(self.runners, self._config, self.parts).placed_like(self)

    def _asked(self, network: str, name: str, value: Tensor) -> dict[str, Tensor]:
        """What a network answers, on the device of ``value`` and in the dtype that the pipeline works in."""
        host = value.detach().cpu()
        given = np.ascontiguousarray((host.float() if host.is_floating_point() else host.long()).numpy())
        found = self.runners[network].infer({name: given})
        return {key: torch.from_numpy(array).to(value.device, self.dtype) for key, array in found.items()}


class EngineTextEncoder(PartComponent):
    """Stands where a CLIP text encoder, with projection or without, or T5's encoder stood."""

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
        """What transformers' encoder gives.

        Args:
            input_ids: int64 [batch, tokens].
            attention_mask: [batch, tokens], all ones: the networks read every token, as diffusers' pipelines ask.
            output_hidden_states: whether the states of every layer are given too (CLIP's alone have them).
            return_dict: a record, or a tuple of what is in it.
            conditions: everything else; accepted only where it asks for nothing.

        Raises:
            InputError: a token is masked, there are more tokens than the encoder has positions, or more is asked for.
        """
        asked = [name for name, value in conditions.items() if value]
        masked = attention_mask is not None and not bool((attention_mask == 1).all())
        if asked or masked:
            raise InputError(f"this text encoder cannot take {asked[0] if asked else 'a mask'}: do without the parts")
        (name,) = self.runners
        tokens = self.parts.networks[name].input.shape[1]
        if isinstance(tokens, int) and input_ids.shape[1] != tokens:
            raise InputError(f"this text encoder takes {tokens} tokens, got {input_ids.shape[1]}")
        found = self._asked(name, "input_ids", input_ids)
        if output_hidden_states and LAYERS not in found:
            raise InputError("this text encoder gives its last states alone: leave output_hidden_states off")
        output = self._record(found, tuple(found[LAYERS]) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()

    def _record(self, found: dict[str, Tensor], layers: tuple[Tensor, ...] | None) -> Any:  # noqa: ANN401 - transformers is not typed
        if POOLED not in found:
            return BaseModelOutput(last_hidden_state=found[STATES])
        if _PROJECTED in (self.config.get("architectures") or ()):
            return CLIPTextModelOutput(text_embeds=found[POOLED], last_hidden_state=found[STATES], hidden_states=layers)
        return BaseModelOutputWithPooling(
            last_hidden_state=found[STATES], pooler_output=found[POOLED], hidden_states=layers
        )


class EngineAutoencoder(PartComponent):
    """Stands where an ``AutoencoderKL`` stood. It computes in its own precision whatever the pipeline's dtype is."""

    def __init__(self, runners: Mapping[str, Runner], config: Mapping[str, Any], parts: PipelineParts) -> None:
        # SDXL's pipeline would cast the network's weights to float32, which there are none of
        super().__init__(runners, dict(config) | {"force_upcast": False}, parts)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:  # noqa: ANN401 - as AutoencoderKL's
        """The distribution of the latents [batch, C, H, W] of pictures [batch, 3, factor * H, factor * W]."""
        distribution = DiagonalGaussianDistribution(self._asked(ENCODER, "image", x)["moments"])
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> Any:  # noqa: ANN401
        """Pictures [batch, 3, factor * H, factor * W] of latents [batch, C, H, W]; ``generator`` is not asked."""
        picture = self._asked(DECODER, "latents", z)["image"]
        return DecoderOutput(sample=picture) if return_dict else (picture,)


def part_components(parts: PipelineParts) -> dict[str, PartComponent]:
    """The components of loaded parts, by their names in a pipeline.

    Raises:
        IntegrityError, MissingEnvironmentError: as :func:`s2p_deploy.engines.pipeline_parts.load_parts`.
    """
    runners = load_parts(parts)
    halves = {name: runners.pop(name) for name in (DECODER, ENCODER)}
    found: dict[str, PartComponent] = {
        name: EngineTextEncoder({name: runner}, parts.networks[name].config, parts) for name, runner in runners.items()
    }
    return found | {AUTOENCODER: EngineAutoencoder(halves, parts.networks[DECODER].config, parts)}
