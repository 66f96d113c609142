"""What every component on engines has in common: its place in a pipeline, and what may be asked of a fixed network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    SlicedAttnProcessor,
)

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

# Methods of diffusers' networks that change no picture: how attention and memory are used, which an engine has decided,
# and the end of what cannot have begun. Those of LoRAs are called on every component that might have some, by pipelines
# that know the names of all.
_CHANGE_NOTHING = frozenset(
    {
        "delete_adapters",
        "disable_forward_chunking",
        "disable_freeu",
        "disable_lora",
        "disable_tiling",
        "enable_lora",
        "fuse_qkv_projections",
        "set_adapters",
        "set_attention_slice",
        "set_default_attn_processor",
        "unfuse_lora",
        "unfuse_qkv_projections",
        "unload_lora",
    }
)
_SAME_ATTENTION = (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    SlicedAttnProcessor,
)
_NO_LORA = "fuse it into the floating-point pipeline (fuse_lora) before you calibrate"
# Members of a network that pipelines use to change it, and the advice where there is an engine instead.
_ADVICE = {
    "load_lora_adapter": f"no LoRA can be loaded: {_NO_LORA}",
    "load_attn_procs": f"no LoRA can be loaded: {_NO_LORA}",
    "fuse_lora": "no LoRA can be fused: one that is loaded acts unfused; to have it in the weights, calibrate --lora",
    "_load_ip_adapter_weights": "no IP-Adapter can be loaded: use the floating-point pipeline",
    "encoder_hid_proj": "it has no image projection: load an IP-Adapter first (load_ip_adapter)",
    "enable_freeu": "FreeU cannot be switched on: use the floating-point pipeline",
    "enable_tiling": "pictures are decoded whole: leave tiling off",
    "get_input_embeddings": "it knows no new tokens: load textual inversions into PyTorch's text encoder",
    "resize_token_embeddings": "it knows no new tokens: load textual inversions into PyTorch's text encoder",
    "text_model": "its layers cannot be reached: leave clip_skip out, or use PyTorch's text encoder",
}


class FixedNetworkError(InputError, AttributeError):
    """An engine has no such member, because its network cannot be changed.

    An ``AttributeError`` too, so that ``hasattr`` returns False.
    """


class EngineComponent(ModelMixin):  # type: ignore[misc]  # diffusers is not typed
    """A pipeline's component that computes on runners and holds no weights.

    A ``ModelMixin``, because diffusers saves and loads no other modules. Its device and dtype are those of the
    pipeline's tensors; the runner's own do not depend on them. A copy shares the runners.
    """

    placement: torch.nn.Parameter

    def __init__(self, config: Mapping[str, Any]) -> None:
        ModelMixin.__init__(self)  # not that of a network whose class a component has too
        self._config = FrozenDict(config)
        # of no elements; accelerate's hooks look at a module's first parameter
        self.placement = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def config(self) -> FrozenDict:
        """Returns the configuration of the network that the component replaces."""
        return self._config

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the pipeline's tensors."""
        return self.placement.dtype

    @property
    def device(self) -> torch.device:
        """Returns the device of the pipeline's tensors."""
        return self.placement.device

    @property
    def attn_processors(self) -> dict[str, object]:
        """Returns nothing: no attention of an engine can be replaced."""
        return {}

    def set_attn_processor(self, processor: object) -> None:
        """Accepts processors that compute attention as the network was trained with it.

        Raises:
            InputError: one computes something else.
        """
        for one in processor.values() if isinstance(processor, dict) else (processor,):
            if not isinstance(one, _SAME_ATTENTION):
                raise InputError(
                    f"an engine's network is fixed, it cannot take {type(one).__name__}: use the floating-point"
                    " pipeline"
                )

    def close(self) -> None:
        """Closes the runners, which copies of this component share."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Copies the engines that the component runs to ``folder``, which must not exist.

        Raises:
            InputError: ``folder`` exists, its disk has no room, or the runner is of no engine on disk.
            IntegrityError: an engine was changed since it was opened.
        """
        raise NotImplementedError

    def is_saved_in(self, folder: Path) -> bool:
        """Returns whether ``folder`` holds what :meth:`save` writes. Raises IntegrityError where that was changed."""
        raise NotImplementedError

    @classmethod
    def opened(cls, folder: Path) -> EngineComponent:
        """Opens what :meth:`save` wrote, verified.

        Raises:
            InputError: there is no such artifact. IntegrityError: it was changed. MissingEnvironmentError: it does not
                run here.
        """
        raise NotImplementedError

    def place(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Sets the device and dtype of the pipeline's tensors; ``to`` with a dtype would log diffusers' warning."""
        self.placement = torch.nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)
        return self

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute
        if name in _CHANGE_NOTHING:
            return _changes_nothing
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            default = f"it has no {name}: what reads or changes that needs the floating-point pipeline"
            raise FixedNetworkError(f"an engine's network is fixed, {_ADVICE.get(name, default)}") from error

    def set_use_memory_efficient_attention_xformers(self, valid: bool, *_options: object) -> None:
        """Refuses to switch xformers on: an engine's attention was chosen when it was built.

        Raises:
            InputError: ``valid`` is True.
        """
        if valid:
            raise InputError("an engine's attention was chosen when it was built: leave xformers off")

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: object) -> None:
        """Copies the component's engines to a folder, as its pipeline's ``save_pretrained`` asks it to.

        A folder that holds them already is left as it is.

        Raises:
            InputError: something else is there, or as :meth:`save`; ``push_to_hub`` is set.
            IntegrityError: an engine was changed since it was opened.
        """
        if options.get("push_to_hub"):
            raise InputError("an engine is not pushed by itself: save it, and upload the folder with huggingface_hub")
        folder = Path(save_directory)
        if folder.exists() and self.is_saved_in(folder):
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.save(folder)

    @classmethod
    def load_config(cls, *_args: object, **_options: object) -> Any:  # noqa: ANN401 - never returns
        """Refuses to be spread over devices, for which diffusers would read the size of every layer.

        Raises:
            InputError: always.
        """
        raise InputError("an engine runs on the device that it was built for: leave device_map out, or name one device")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **options: Any) -> Any:  # noqa: ANN401
        """Opens what :meth:`save_pretrained` wrote, as ``DiffusionPipeline.from_pretrained`` asks.

        Args:
            pretrained_model_name_or_path: the folder.
            options: diffusers' own; ``subfolder`` and ``torch_dtype`` (or ``dtype``) are read.

        Raises:
            InputError: there is no engine. IntegrityError: it was changed. MissingEnvironmentError: it does not run
                here.
        """
        folder = Path(str(pretrained_model_name_or_path), options.get("subfolder") or "")
        if (folder / "model_index.json").is_file():  # diffusers looks there where the component has no folder
            raise InputError(f"{folder} lacks the folder of an engine that its model_index.json names: save it again")
        dtype = options.get("torch_dtype") or options.get("dtype") or torch.float32
        return cls.opened(folder).place(torch.device("cpu"), dtype)


def _changes_nothing(*_args: object, **_options: object) -> None:
    """Does nothing, as the call that it stands for would with this network."""
