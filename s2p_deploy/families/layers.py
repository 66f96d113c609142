"""Quantizable layers of an indexed denoiser, and which tensor each reads, discovered in one forward pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
from torch.overrides import TorchFunctionMode

from s2p_deploy.errors import InputError
from s2p_deploy.families.model_family import latent_channels
from s2p_deploy.families.registry import family_of_config
from s2p_deploy.families.transforms import ShiftedLayer, SmoothedLinear, has_bias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from s2p_deploy.families.indexed_denoiser import IndexedDenoiser
    from s2p_deploy.families.model_family import Config


@dataclass(frozen=True)
class QuantizableLayer:
    """A Conv or Linear with weights.

    Attributes:
        name: module path, relative to the network.
        op: its operator.
        tensor: number of the tensor that it reads; layers with the same number read the very same tensor.
        reads: the latents (``sample``), only the text, without dependence on the timestep, or an activation.
        last: a forward pass ends with it.
    """

    name: str
    op: Literal["conv", "linear"]
    tensor: int
    reads: Literal["sample", "text", "activation"] = "activation"
    last: bool = False


@dataclass(frozen=True)
class _Reading:
    """A module that ran, and its input, kept alive so that identities stay unique."""

    name: str
    module: torch.nn.Module
    tensor: Tensor


@dataclass(frozen=True)
class DenoiserInputs:
    """Arguments of an indexed denoiser, as :meth:`IndexedDenoiser.forward` takes them."""

    sample: Tensor
    timestep_index: Tensor
    encoder_hidden_states: Tensor
    added_cond: Tensor

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the arguments in order."""
        return self.sample, self.timestep_index, self.encoder_hidden_states, self.added_cond


def zero_inputs(denoiser: IndexedDenoiser, *, tokens: int, batch: int = 1) -> DenoiserInputs:
    """Makes inputs of zeros of the right shapes, on the denoiser's device and in its dtype."""
    like = next(denoiser.network.parameters())
    return DenoiserInputs(
        like.new_zeros(batch, *sample_shape_of(denoiser.config)),
        torch.zeros(batch, dtype=torch.int64, device=like.device),
        like.new_zeros(batch, tokens, denoiser.family.text_width(denoiser.config)),
        like.new_zeros(batch, denoiser.added_width),
    )


def latent_shape(denoiser: IndexedDenoiser) -> tuple[int, int, int]:
    """Returns (C, H, W) of the latents that the denoiser was trained on."""
    return latent_shape_of(denoiser.config)


def latent_shape_of(config: Config) -> tuple[int, int, int]:
    """Returns (C, H, W) of the latents that a network of a diffusers configuration was trained on."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return latent_channels(config), height, width


def sample_shape_of(config: Config) -> tuple[int, int, int]:
    """Returns (C, H, W) of what such a network reads: latents, and for inpainting a mask and a picture's latents."""
    return family_of_config(config).sample_channels(config), *latent_shape_of(config)[1:]


def discover_layers(denoiser: IndexedDenoiser, tokens: int = 2) -> tuple[QuantizableLayer, ...]:
    """Discovers every layer, in the order in which a forward pass reaches it.

    Raises:
        InputError: the network cannot be run, because its configuration has a value that its layers do not take.
    """
    quantizable = (torch.nn.Conv2d, torch.nn.Linear)
    # watched too: where such a module reads the text, the layers inside it read a function of the text
    rewritten = (SmoothedLinear, ShiftedLayer)
    modules = dict(denoiser.network.named_modules())
    watched = [name for name, module in modules.items() if isinstance(module, quantizable + rewritten)]
    inputs = zero_inputs(denoiser, tokens=tokens)
    try:
        readings = _watch(denoiser, watched, inputs)
    except Exception as error:  # values of a configuration reach any code of diffusers
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the denoiser's config.json makes a network that cannot be run ({type(error).__name__}: {reason})"
        ) from error
    sources: dict[int, Literal["sample", "text"]] = {
        id(inputs.sample): "sample",
        id(inputs.encoder_hidden_states): "text",
    }
    named = {reading.name: sources[id(reading.tensor)] for reading in readings if id(reading.tensor) in sources}
    layers = [reading for reading in readings if isinstance(reading.module, quantizable)]
    numbers: dict[int, int] = {}
    return tuple(
        QuantizableLayer(
            reading.name,
            "conv" if isinstance(reading.module, torch.nn.Conv2d) else "linear",
            numbers.setdefault(id(reading.tensor), len(numbers)),
            reads=_source(reading.name, named),
            last=reading is layers[-1],
        )
        for reading in layers
    )


def readers_by_tensor(denoiser: IndexedDenoiser, names: Sequence[str], tokens: int = 2) -> tuple[tuple[str, ...], ...]:
    """Groups the modules ``names`` by the tensor that they read."""
    groups: dict[int, list[str]] = {}
    readings = _watch(denoiser, names, zero_inputs(denoiser, tokens=tokens))
    for reading in readings:
        groups.setdefault(id(reading.tensor), []).append(reading.name)
    return tuple(tuple(group) for group in groups.values())


def layers_behind_norms(denoiser: IndexedDenoiser, tokens: int = 2) -> dict[str, tuple[str, ...]]:
    """Finds norms with a bias whose output layers alone read; returns those layers by the norm's path."""
    modules = dict(denoiser.network.named_modules())
    uses = _UsesOfNorms()
    hooks = [
        module.register_forward_hook(lambda _, _args, output, path=path: uses.follow(path, output))
        for path, module in modules.items()
        if has_bias(module)
    ]
    readings: list[_Reading] = []
    try:
        with uses:
            names = [name for name, module in modules.items() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
            readings = _watch(denoiser, names, zero_inputs(denoiser, tokens=tokens))
    finally:
        for hook in hooks:
            hook.remove()
    readers: dict[str, list[str]] = {}
    for reading in readings:
        norm = uses.norm_of(reading.tensor)
        if norm is not None:
            readers.setdefault(norm, []).append(reading.name)
    return {norm: tuple(layers) for norm, layers in readers.items() if uses.counts[norm] == len(layers)}


class _UsesOfNorms(TorchFunctionMode):
    """Counts the operations that read the outputs of norms."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # kept alive, so that identities stay unique

    def follow(self, norm: str, output: Tensor) -> None:
        self._outputs[id(output)] = norm, output

    def norm_of(self, tensor: object) -> str | None:
        return self._outputs.get(id(tensor), (None,))[0]

    def __torch_function__(
        self,
        func: Callable[..., object],
        _types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):  # what asks for a shape reads nothing
            self.counts.update({norm for value in (*args, *(kwargs or {}).values()) if (norm := self.norm_of(value))})
        return result


def _watch(denoiser: IndexedDenoiser, names: Sequence[str], inputs: DenoiserInputs) -> list[_Reading]:
    """Records the inputs of the modules ``names`` in one forward pass, in its order."""
    readings: list[_Reading] = []
    hooks = [
        denoiser.network.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: readings.append(_Reading(name, module, args[0]))
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            denoiser(*inputs.arguments())
    finally:
        for hook in hooks:
            hook.remove()
    return readings


def _source(path: str, named: dict[str, Literal["sample", "text"]]) -> Literal["sample", "text", "activation"]:
    """Returns the source that a module or one of its parents reads."""
    path_and_parents = accumulate(path.split("."), lambda parent, leaf: f"{parent}.{leaf}")
    return next((named[module] for module in path_and_parents if module in named), "activation")
