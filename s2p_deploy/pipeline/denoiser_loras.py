"""The LoRAs of a denoiser on an engine, as diffusers' pipelines load, weigh and unload them."""

from __future__ import annotations

import logging
import math
import weakref
from contextlib import suppress
from functools import cached_property
from itertools import count
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import is_peft_available

from s2p_deploy.engines.lora_bank import BranchMatrices
from s2p_deploy.errors import InputError
from s2p_deploy.families import family_of_config
from s2p_deploy.families.lora import Lora, LoraInMemory, network_weights
from s2p_deploy.pipeline.engine_component import EngineComponent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.engines.lora_bank import LoraBank

LOG = logging.getLogger("s2p_deploy.pipeline")
_KEYS = count(1)
NO_BRANCHES = (
    "this engine has no low-rank branches, so no LoRA can be loaded: export with --lora-rank, or fuse it (calibrate"
    " --lora, or adapt)"
)
_WEIGHT = "a LoRA's weight"
SCALE, LORAS = "scale", "loras"  # keys of cross_attention_kwargs and joint_attention_kwargs


class DenoiserLoras(torch.nn.Module):
    """LoRAs by their names in one pipeline; the engine's bank, which several pipelines may share, holds the matrices.

    A module without weights, which ``isinstance`` takes for a layer of PEFT's: diffusers' pipelines ask the first such
    layer of a network for the LoRAs that act.

    Attributes:
        loaded: the bank's key of every LoRA, by name.
        active: the weights of those that act, by name.
        enabled: whether any acts.
        merged_adapters, lora_A: as of PEFT's layers. No LoRA is in the weights, and none has tensors to be moved.
    """

    merged_adapters: tuple[str, ...] = ()
    lora_A: Mapping[str, torch.nn.Module] = MappingProxyType({})  # noqa: N815 - PEFT's name

    def __init__(self, bank: LoraBank | None, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._bank, self._config = bank, dict(config)
        self.loaded: dict[str, str] = {}
        self.active: dict[str, float] = {}
        self._weights: dict[str, float] = {}  # that were last given, of all
        self.enabled = True
        if bank is not None:
            # by the names that are loaded then; the finalizer must not hold this object itself
            weakref.finalize(self, _forget, bank, self.loaded).atexit = False

    def copy(self) -> DenoiserLoras:
        """Returns LoRAs of the same bank, which are loaded and weighed apart from now on."""
        copied = DenoiserLoras(self._bank, self._config)
        copied.active, copied.enabled, copied._weights = dict(self.active), self.enabled, dict(self._weights)
        for name, key in self.loaded.items():
            copied.loaded[name] = f"{name}#{next(_KEYS)}"
            self.bank.repeat(key, copied.loaded[name])
        return copied

    def load(
        self, tensors: Mapping[str, Tensor], name: str | None, settings: Mapping[str, Any], *, replace: bool = False
    ) -> None:
        """Adds a LoRA, which alone acts from now on, with weight 1, unless it replaces one.

        Args:
            tensors: by the names of a file, each beginning with the denoiser's component.
            name: of the LoRA in its pipeline (None: ``default_0`` and so on).
            settings: PEFT's, prefixed with the component.
            replace: whether the LoRA takes the place of the one of that name.

        Raises:
            InputError: it is none of this network, or of more ranks or other layers than the engine has branches for;
                its name is taken, or with ``replace`` is not.
        """
        name = name or next(each for each in map("default_{}".format, count()) if each not in self.loaded)
        if (name in self.loaded) != replace:
            taken = "there is no LoRA of that name to replace" if replace else "that name is taken: unload it first"
            raise InputError(f"LoRA {name!r} cannot be loaded, {taken}")
        self.add(Lora(name, {self.component: self.weights}, LoraInMemory(tensors, settings)), name)
        if not replace:
            self.set({name: 1.0})

    def add(self, lora: Lora, name: str) -> None:
        """Adds a LoRA under a name, or in place of the one of that name; it does not act yet.

        Raises:
            InputError: the engine has no branches, or none that fit.
        """
        bank = self.bank
        key = self.loaded.get(name) or f"{name}#{next(_KEYS)}"
        bank.add(key, BranchMatrices.of(lora, self.component, bank.slots))
        self.loaded[name] = key

    def set(self, weights: Mapping[str, object]) -> None:
        """Lets these LoRAs act, with their weights by name (None: 1), and no others.

        Raises:
            InputError: a name is unknown, or a weight is not one finite number.
        """
        self._check_loaded(list(weights))
        self.active = {name: 1.0 if weight is None else _finite(weight, _WEIGHT) for name, weight in weights.items()}
        self._weights |= self.active

    def delete(self, names: Sequence[str]) -> None:
        """Unloads LoRAs; unknown names are passed over."""
        for name in names:
            key = self.loaded.pop(name, None)
            for weights in (self.active, self._weights):
                weights.pop(name, None)
            if key is not None and self._bank is not None:
                self._bank.remove(key)

    def let_another_act(self) -> None:
        """Lets the first LoRA by name act with its last weight, as PEFT does where all that acted were deleted."""
        if self.loaded:
            first = min(self.loaded)
            LOG.warning("the LoRAs that acted are deleted: %s acts now, as in PEFT (set_adapters chooses)", first)
            self.set({first: self._weights.get(first)})

    @property
    def active_adapters(self) -> list[str]:
        """Lists the names of the LoRAs that were set to act, in their order."""
        return list(self.active)

    def unmerge(self) -> None:
        """Does nothing: no LoRA is in the weights."""

    def strengths(self, attention: Mapping[str, Any], sample: Tensor) -> NDArray[np.floating[Any]] | None:
        """Makes the strengths [batch, rank] of a call; None where nothing acts.

        Args:
            attention: diffusers' ``cross_attention_kwargs``: ``scale`` multiplies all weights; ``loras``, weights by
                name, stand in place of the active ones: one mapping for all, or one for each picture of the call in
                their order, so that a prompt's is repeated for ``num_images_per_prompt``. One for each sample, with
                those of the other half of guidance, is taken too.
            sample: [batch, C, H, W] latents. Nothing else tells whether a call is guided: its halves are equal then,
                and the pictures half as many as the samples. Calls of pictures with equal noise look so without
                guidance: give them one mapping for each sample.

        Raises:
            InputError: there is another key, a value is not of that kind, a LoRA is not loaded, or there are more or
                fewer mappings than pictures.
        """
        unknown = sorted(set(attention) - {SCALE, LORAS})
        if unknown:
            raise InputError(
                f"an engine's network is fixed, it cannot take {unknown[0]} in cross_attention_kwargs: leave it out"
            )
        given = attention.get(LORAS, self.active if self.enabled else {})
        scale, rows = _finite(attention.get(SCALE, 1.0), "the scale of LoRAs"), _rows(given, sample)
        self._check_loaded([name for row in rows for name in row])
        scaled = [{self.loaded[name]: _finite(weight, _WEIGHT) * scale for name, weight in row.items()} for row in rows]
        if not any(scaled):
            return None
        return self.bank.strengths(scaled * (len(sample) // len(rows)))

    @property
    def component(self) -> str:
        """Returns the denoiser's name in its pipeline."""
        return family_of_config(self._config).component

    @cached_property
    def weights(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes of the denoiser's weights that can be changed, by path of their layer."""
        with torch.device("meta"):
            return network_weights(family_of_config(self._config).build(self._config))

    def _check_loaded(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.loaded]
        if unknown:
            raise InputError(f"there is no LoRA {unknown[0]!r}: load it first")

    @property
    def bank(self) -> LoraBank:
        """Returns the engine's low-rank branches. Raises InputError where it has none."""
        if self._bank is None:
            raise InputError(NO_BRANCHES)
        return self._bank


if is_peft_available():  # without it pipelines load no LoRA
    from peft.tuners.tuners_utils import BaseTunerLayer

    BaseTunerLayer.register(DenoiserLoras)


def _forget(bank: LoraBank, loaded: Mapping[str, str]) -> None:
    bank.forget(loaded.values())


def _finite(number: object, what: str) -> float:
    """Returns a number as a float. Raises InputError where it is not one finite number."""
    if isinstance(number, int | float) and not isinstance(number, bool):
        with suppress(OverflowError):  # Python's integers have any size
            if math.isfinite(number):
                return float(number)
    raise InputError(f"{what} on an engine is one finite number for all layers, not {number!r:.60}")


def _rows(given: object, sample: Tensor) -> list[dict[str, object]]:
    """Returns the weights by name of all pictures of a call, of each, or of each sample.

    Raises:
        InputError: they are something else.
    """
    each = list(given) if isinstance(given, list | tuple) else [given]
    rows = [row for row in each if isinstance(row, dict)]
    if not rows or len(rows) < len(each):
        raise InputError(
            f"{LORAS} in cross_attention_kwargs is {given!r:.60}: give weights by name in a dict for all pictures, or a"
            " list of one dict for each"
        )
    batch = len(sample)
    if len(rows) not in {1, batch}:
        pictures = batch // 2 if _is_guided(sample) else batch
        if len(rows) != pictures:
            raise InputError(
                f"{len(rows)} settings of LoRAs for a call of {pictures} pictures: give one for all, or {pictures}, one"
                " for each picture, those of a prompt repeated for num_images_per_prompt"
            )
    return rows


def _is_guided(sample: Tensor) -> bool:
    """Tells whether a batch is of a guided call: pipelines give the denoiser the same latents twice."""
    half, odd = divmod(len(sample), 2)
    return not odd and torch.allclose(sample[:half], sample[half:], rtol=0, atol=0, equal_nan=True)


class ComponentWithLoras(EngineComponent):
    """A denoiser as diffusers' loaders of LoRAs see it.

    Attributes:
        loras: those that are loaded.
    """

    loras: DenoiserLoras

    def __init__(self, config: Mapping[str, Any], loras: DenoiserLoras) -> None:
        super().__init__(config)
        self.loras = loras

    @property
    def peft_config(self) -> dict[str, str]:
        """Returns the LoRAs that are loaded, by name; diffusers reads the names alone, and whether there is any.

        Raises:
            AttributeError: there is none, as in a network of diffusers.
        """
        if not self.loras.loaded:
            raise AttributeError("no LoRA is loaded")
        return self.loras.loaded

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Mapping[str, Tensor],
        prefix: str | None = "unet",
        *,
        hotswap: bool = False,
        **options: Any,  # noqa: ANN401 - diffusers' own
    ) -> None:
        """Loads a LoRA into the engine's low-rank branches, as pipelines' ``load_lora_weights`` asks: no rebuild.

        One without a tensor for the denoiser is passed over with a warning: it may be for a text encoder.

        Args:
            pretrained_model_name_or_path_or_dict: its tensors; of other components' names none is read.
            prefix: what the denoiser's names begin with (None: all tensors are its own).
            hotswap: replaces the LoRA of that name.
            options: diffusers' own; ``adapter_name``, ``network_alphas`` and ``metadata`` are read.

        Raises:
            InputError: as :meth:`DenoiserLoras.load`; the tensors are not in memory.
        """
        _ = self.loras.bank  # raises where the engine has none
        given, name = pretrained_model_name_or_path_or_dict, options.get("adapter_name")
        if not isinstance(given, dict):
            raise InputError("an engine takes the tensors of a LoRA: load it with the pipeline's load_lora_weights")
        which = "a LoRA" if name is None else f"LoRA {name!r}"
        _check_components(options.get("_pipeline"), given, which)
        alphas = {name: torch.tensor(float(alpha)) for name, alpha in (options.get("network_alphas") or {}).items()}
        begin = "" if prefix is None else f"{prefix}."
        own = {name: tensor for name, tensor in {**given, **alphas}.items() if name.startswith(begin)}
        if own:
            self.loras.load(own, name, options.get("metadata") or {}, replace=hotswap)
        else:
            first = next(iter(given), "none")
            LOG.warning(
                "nothing in %s is for this denoiser, whose names begin with %r (its first tensor is %.200s): it leaves"
                " the denoiser as it is",
                *(which, begin, first),
            )

    def set_adapters(self, adapter_names: str | list[str], weights: object = None) -> None:
        """Lets LoRAs act with weights, one for each or one for all, and no others.

        A name that is not loaded here is passed over with a warning: the LoRA may be one of a text encoder alone.

        Raises:
            InputError: as :meth:`DenoiserLoras.set`, or there are more or fewer weights than names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = weights if isinstance(weights, list) else [weights] * len(names)
        if len(names) != len(given):
            raise InputError(f"{len(names)} LoRAs and {len(given)} weights: give one weight for each, or one for all")
        elsewhere = [name for name in names if name not in self.loras.loaded]
        if elsewhere:
            LOG.warning("no LoRA %r is loaded in this denoiser: nothing of it acts here", elsewhere[0])
        self.loras.set({name: weight for name, weight in zip(names, given, strict=True) if name not in elsewhere})

    def active_adapters(self) -> list[str]:
        """Lists the names of the LoRAs that act."""
        return self.loras.active_adapters

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """Unloads LoRAs by name; where all that acted are, another one acts, as in a network of diffusers."""
        acted = bool(self.loras.active)
        self.loras.delete([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        if acted and not self.loras.active:
            self.loras.let_another_act()

    def unload_lora(self) -> None:
        """Unloads all LoRAs."""
        self.loras.delete(list(self.loras.loaded))
        self.loras.enabled = True

    def disable_lora(self) -> None:
        """Lets no LoRA act, until they are enabled again."""
        self.loras.enabled = False

    def enable_lora(self) -> None:
        """Lets the LoRAs act that were set."""
        self.loras.enabled = True


def _check_components(pipe: DiffusionPipeline | None, tensors: Mapping[str, Tensor], which: str) -> None:
    """Raises InputError where a LoRA changes a component of the pipeline, besides its denoiser, that is an engine."""
    parts = {} if pipe is None else pipe.components
    changed = (name for name in parts if any(tensor.startswith(f"{name}.") for tensor in tensors))
    for name in changed:
        if isinstance(parts[name], EngineComponent) and not isinstance(parts[name], ComponentWithLoras):
            raise InputError(
                f"{which} changes the {name}, which runs on an engine here: open the pipeline without engines of its"
                " components, or fuse the LoRA (calibrate --lora)"
            )
