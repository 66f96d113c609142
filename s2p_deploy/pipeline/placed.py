"""What stands in a pipeline where a network stood, without being one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

# What pipelines call on their networks to change them, and what to do instead.
_INSTEAD = {
    "load_lora_adapter": "no LoRA can be loaded: fuse it before you calibrate",
    "load_attn_procs": "no LoRA can be loaded: fuse it before you calibrate",
    "fuse_lora": "no LoRA can be fused: fuse it before you calibrate",
    "set_adapters": "no LoRA can be set: fuse it before you calibrate",
    "_load_ip_adapter_weights": "no IP-Adapter can be loaded: use the floating-point pipeline",
    "enable_freeu": "FreeU cannot be switched on: use the floating-point pipeline",
    "enable_tiling": "pictures are decoded whole: leave tiling off",
    "enable_slicing": "pictures are decoded whole: leave slicing off, or ask for fewer at once",
    "text_model": "its layers cannot be reached: leave clip_skip out, or do without the parts",
}


class FixedNetworkError(InputError, AttributeError):
    """What was asked of an engine is a part or a method of a network that can be changed.

    An ``AttributeError`` too, so that ``hasattr`` says no.
    """


class PlacedComponent(ModelMixin):  # type: ignore[misc]  # diffusers is not typed
    """A component that holds no weights and asks a runner.

    A ``ModelMixin``, because diffusers silently drops other modules on ``save_pretrained`` where this one can refuse.
    Its device and dtype are those of the tensors around it, the runner's are its own affair.
    """

    placement: torch.nn.Parameter

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._config = FrozenDict(config)
        # of no elements; accelerate's hooks look at a module's first parameter
        self.placement = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def config(self) -> FrozenDict:
        """The configuration of the network that stood here."""
        return self._config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the pipeline works in."""
        return self.placement.dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline's tensors are."""
        return self.placement.device

    def placed_like(self, other: PlacedComponent) -> Self:
        """This, on the device and in the dtype of ``other``."""
        self.placement = torch.nn.Parameter(other.placement.detach().clone(), requires_grad=False)
        return self

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            why = _INSTEAD.get(name, f"it has no {name}: what reads or changes that needs the floating-point pipeline")
            raise FixedNetworkError(f"an engine's network is fixed, {why}") from error

    def set_use_memory_efficient_attention_xformers(self, valid: bool, *_options: object) -> None:
        """Refuses to switch it on: an engine's attention was chosen when it was built.

        Raises:
            InputError: ``valid`` asks for it.
        """
        if valid:
            raise InputError("an engine's attention was chosen when it was built: leave xformers off")

    def save_pretrained(self, *_args: object, **_options: object) -> NoReturn:
        """Refuses: an engine is an artifact of its own, which is kept as it is.

        Raises:
            InputError: always.
        """
        raise InputError("an engine is not saved by save_pretrained: use s2p_deploy.pipeline.save_engine_pipeline")
