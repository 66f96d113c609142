"""Image prompts of a UNet on an engine: IP-Adapters as diffusers' pipelines load, weigh and unload them.

Image embeds become tokens, and tokens keys and values, in PyTorch and once per prompt: the engine takes the latter.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection

from s2p_deploy.errors import InputError
from s2p_deploy.families.ip_adapter import PROJECTION, attention_frame, check_ip_adapter, cross_attentions
from s2p_deploy.pipeline.engine_component import EngineComponent
from s2p_deploy.records.optional_inputs import IMAGE_BIAS, IMAGE_KEYS, IMAGE_REACH, IMAGE_VALUES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from s2p_deploy.families.ip_adapter import IpAdapterWeights
    from s2p_deploy.families.model_family import Config
    from s2p_deploy.records.optional_inputs import ImageSlots

_EMBEDS = "image_embeds"  # the key of a pipeline's ``added_cond_kwargs``
_NO_TOKEN = -1e4  # added to scores: exp of it is zero, and half precision has it


@dataclass(frozen=True)
class _Seen:
    """Image embeds and strengths, and what the engine takes for them; references keep their memory theirs."""

    embeds: tuple[Tensor, ...]
    versions: tuple[int, ...]
    strengths: tuple[float, ...]
    inputs: dict[str, Tensor]

    def is_of(self, embeds: Sequence[Tensor], strengths: tuple[float, ...]) -> bool:
        """Tells whether these are the very same tensors, nothing was written there since, and the strengths equal."""
        if len(embeds) != len(self.embeds) or any(each.is_inference() for each in embeds):  # their writes do not count
            return False
        same = all(ours is theirs for ours, theirs in zip(self.embeds, embeds, strict=True))
        return same and self.versions == tuple(each._version for each in embeds) and self.strengths == strengths


class IpAdapters(torch.nn.Module):
    """IP-Adapters that act together on one UNet.

    Args:
        weights: of each, as diffusers' ``load_ip_adapter`` takes them.
        names: of each, for messages.
        config: of the UNet.
        slots: what the engine takes.

    Attributes:
        frame: a UNet of attentions alone. Its processors hold the matrices, and the scales that users set.
        projection: makes image tokens.

    Raises:
        InputError: weights are none of this UNet, or of a kind or number that the engine does not take.
    """

    def __init__(
        self, weights: Sequence[IpAdapterWeights], names: Sequence[str], config: Config, slots: ImageSlots
    ) -> None:
        super().__init__()
        if len(weights) > slots.adapters:
            raise InputError(
                f"{len(weights)} IP-Adapters at once, this engine takes {slots.adapters}: export with --image-adapters"
                f" {len(weights)}"
            )
        self.slots, self.frame = slots, attention_frame(config)
        widths, text = {slot.layer: slot.width for slot in slots.layers}, int(self.frame.config.cross_attention_dim)
        attentions = [(widths[layer], text) for layer in cross_attentions(self.frame)]
        for each, name in zip(weights, names, strict=True):
            self._check_tokens(check_ip_adapter(each, name, attentions), f"an image of IP-Adapter {name}")
        layers = [self._projection(each[PROJECTION], name) for each, name in zip(weights, names, strict=True)]
        self.projection = MultiIPAdapterImageProjection(layers)
        self.frame.set_attn_processor(
            self.frame._convert_ip_adapter_attn_to_diffusers([dict(each) for each in weights], low_cpu_mem_usage=False)
        )
        self._seen: _Seen | None = None

    @torch.no_grad()
    def inputs(self, embeds: object, like: Tensor) -> dict[str, Tensor]:
        """Makes the engine's inputs [batch, ...] of image embeds; kept while these are the same tensors.

        Args:
            embeds: of every adapter, [batch, images, D] or [batch, images, tokens, D].
            like: the sample; its batch, device and dtype are those of the inputs.

        Raises:
            InputError: they are of other adapters, or make more tokens than the engine takes; a scale is no number.
        """
        each_of = embeds if isinstance(embeds, list | tuple) else [embeds]
        given = [each for each in each_of if isinstance(each, torch.Tensor)]
        loaded = len(self.projection.image_projection_layers)
        if not len(given) == len(each_of) == loaded:
            raise InputError(
                f"image embeds of {len(each_of)} IP-Adapters, {loaded} are loaded: give one tensor for each"
            )
        if any(each.dim() not in {3, 4} or len(each) != len(like) for each in given):
            shapes = ", ".join(str(list(each.shape)) for each in given)
            raise InputError(f"image embeds {shapes} must be [{len(like)}, images, ...], as the batch")
        strengths = self._strengths()
        if self._seen is None or not self._seen.is_of(given, strengths):
            made = self._made(given, like)
            if any(each.is_inference() for each in given):
                return made
            self._seen = _Seen(tuple(given), tuple(each._version for each in given), strengths, made)
        return self._seen.inputs

    def _made(self, embeds: Sequence[Tensor], like: Tensor) -> dict[str, Tensor]:
        self.to(like.device, like.dtype)
        return packed(self.slots, like, self.prompts([each.to(like) for each in embeds]))

    @torch.no_grad()
    def prompts(self, embeds: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Makes keys and values [batch, tokens, columns] of every adapter, scaled, of embeds where and as it is.

        Raises:
            InputError: as :meth:`inputs`.
        """
        try:
            tokens = [each.flatten(1, 2) for each in self.projection(list(embeds))]
        except RuntimeError as error:  # PyTorch's words for widths that do not fit
            raise InputError("the image embeds are of another image encoder than the IP-Adapter's") from error
        for each in tokens:
            self._check_tokens(each.shape[1], "an image prompt")
        layers = [(self.frame.attn_processors[f"{slot.layer}.processor"], slot.scale) for slot in self.slots.layers]
        return [
            (
                torch.cat([layer.to_k_ip[number](each) * scale for layer, scale in layers], -1),
                torch.cat([layer.to_v_ip[number](each) * layer.scale[number] for layer, _ in layers], -1),
            )
            for number, each in enumerate(tokens)
        ]

    def _strengths(self) -> tuple[float, ...]:
        processors = self.frame.attn_processors
        scales = [scale for slot in self.slots.layers for scale in processors[f"{slot.layer}.processor"].scale]
        odd = next((scale for scale in scales if not isinstance(scale, int | float)), None)
        if odd is not None:
            raise InputError(f"an IP-Adapter on an engine has one scale per layer, not {odd!r}")
        return tuple(map(float, scales))

    def _projection(self, weights: Mapping[str, Tensor], name: str) -> nn.Module:
        try:
            layer: nn.Module = self.frame._convert_ip_adapter_image_proj_to_diffusers(weights, low_cpu_mem_usage=False)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"IP-Adapter {name}: its image projection is not whole: get the file again") from error
        return layer

    def _check_tokens(self, count: int, what: str) -> None:
        if not 1 <= count <= self.slots.tokens:
            raise InputError(
                f"{what} has {count} tokens, this engine takes {self.slots.tokens}: export with --image-tokens {count}"
            )


def packed(slots: ImageSlots, like: Tensor, prompts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Puts keys and values [batch, tokens, columns] of several prompts into the engine's inputs, as ``like`` is.

    What an attention finds in a prompt is a mean of its values, so no larger than the largest of them, and of several
    prompts no larger than the sum. By that ``reach`` [batch, attentions] the grid of what reads the attention grows.
    """
    keys = like.new_zeros(len(like), slots.most_tokens, slots.width)
    values, bias = keys.clone(), like.new_full((len(like), slots.most_tokens), _NO_TOKEN)
    reach = like.new_zeros(len(like), len(slots.layers))
    for number, (own_keys, own_values) in enumerate(prompts):
        start, stop = number * slots.tokens, number * slots.tokens + own_keys.shape[1]
        keys[:, start:stop], values[:, start:stop], bias[:, start:stop] = own_keys, own_values, 0
        of_attentions = own_values.abs().amax(1).split([slot.width for slot in slots.layers], 1)
        reach += torch.stack([largest.amax(1) for largest in of_attentions], 1)
    inputs = {IMAGE_KEYS: keys, IMAGE_VALUES: values, IMAGE_BIAS: bias}
    return inputs | {IMAGE_REACH: reach} if slots.quantizers else inputs


class TakesImagePrompts(EngineComponent):
    """A UNet as diffusers' loaders of IP-Adapters see it.

    Attributes:
        ip_adapters: those that are loaded.
        prompted: inputs of image prompts for every call, in place of a pipeline's image embeds (None: no such).
        images: what of image prompts the engine takes (None: nothing).
    """

    images: ImageSlots | None
    ip_adapters: IpAdapters | None
    prompted: dict[str, Tensor] | None

    @property
    def attn_processors(self) -> dict[str, Any]:
        """Returns the processors of the IP-Adapters; without them none: an engine's attention cannot be replaced."""
        return {} if self.ip_adapters is None else dict(self.ip_adapters.frame.attn_processors)

    @property
    def down_blocks(self) -> Any:  # noqa: ANN401 - diffusers' own, to find the attentions of scales by block
        """Returns the blocks that IP-Adapters act in; without them there is no such attribute."""
        return self._frame("down_blocks")

    @property
    def up_blocks(self) -> Any:  # noqa: ANN401 - as above
        """Returns the blocks on the way up."""
        return self._frame("up_blocks")

    def set_attn_processor(self, processor: object) -> None:
        """Accepts processors that compute attention as the network was trained with it, which unloads IP-Adapters.

        Raises:
            InputError: one computes something else, but for those of the IP-Adapters that are loaded.
        """
        given = processor if isinstance(processor, dict) else {}
        if any(isinstance(each, IPAdapterAttnProcessor2_0) for each in given.values()):
            loaded = list(self.attn_processors.values())
            if all(any(each is own for own in loaded) for each in given.values()):
                return
        super().set_attn_processor(processor)
        self.ip_adapters = None

    def _load_ip_adapter_weights(self, state_dicts: Any, **_options: object) -> None:  # noqa: ANN401 - diffusers' own
        """Loads IP-Adapters in place of those that were, as pipelines' ``load_ip_adapter`` asks: no rebuild.

        Raises:
            InputError: as :class:`IpAdapters`; the engine takes no image prompts.
        """
        slots = self.images
        if slots is None:
            raise InputError(
                "this engine takes no image prompts, so no IP-Adapter can be loaded: export with --image-tokens"
            )
        weights = list(state_dicts) if isinstance(state_dicts, list | tuple) else [state_dicts]
        names = [str(number) for number in range(1, len(weights) + 1)]
        adapters = IpAdapters(weights, names, dict(self.config), slots).to(self.device, self.dtype)
        self._take(adapters)
        self.config.encoder_hid_dim_type = "ip_image_proj"

    def _take(self, adapters: IpAdapters | None) -> None:
        self.ip_adapters = adapters
        if adapters is not None:
            self.encoder_hid_proj = adapters.projection

    def _load_ip_adapter_loras(self, _state_dicts: object) -> dict[int, dict[str, Tensor]]:
        """Returns none: those of FaceID were refused."""
        return {}

    def image_inputs(self, conditions: Mapping[str, Any], sample: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Takes image embeds out of a call's conditions; returns what is left, and the engine's inputs for them.

        Raises:
            InputError: there are some and no IP-Adapter, or the other way round; as :meth:`IpAdapters.inputs`.
        """
        if self.prompted is not None:
            return dict(conditions), self.prompted
        added = conditions.get("added_cond_kwargs") or {}
        embeds = added.get(_EMBEDS)
        rest = {**conditions, "added_cond_kwargs": {key: value for key, value in added.items() if key != _EMBEDS}}
        if self.ip_adapters is None:
            if embeds is None:
                return rest, {}
            raise InputError(
                "without an IP-Adapter an engine cannot take image_embeds in added_cond_kwargs: load it first"
                " (load_ip_adapter)"
            )
        if embeds is None:
            raise InputError("an IP-Adapter is loaded: give ip_adapter_image, or unload it (unload_ip_adapter)")
        return rest, self.ip_adapters.inputs(embeds, sample)

    def __copy__(self) -> Self:
        copied: Self = super().__copy__()
        copied.prompted = self.prompted
        copied._take(self.ip_adapters)
        return copied

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        copied: Self = super().__deepcopy__(memo)
        copied._take(copy.deepcopy(self.ip_adapters))
        return copied

    def _frame(self, name: str) -> Any:  # noqa: ANN401 - as above
        if self.ip_adapters is None:
            raise AttributeError(name)  # the component's own advice is given then
        return getattr(self.ip_adapters.frame, name)
