"""Single-file checkpoints: the networks of a Stable Diffusion model in one file, under the names of its original code.

diffusers' own functions translate the names. They are given deferred tensors, so a file of any size is compared with
its networks before anything is written, and then read one tensor at a time.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders import single_file_utils as original
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import safe_open

from s2p_deploy.errors import InputError
from s2p_deploy.families.checkpoint import (
    DIFFUSERS_WEIGHTS,
    DTYPES,
    TRANSFORMERS_WEIGHTS,
    Checkpoint,
    StoredTensor,
    TensorForm,
)
from s2p_deploy.families.deferred_tensor import DeferredTensor
from s2p_deploy.families.network_files import check_network, is_of_diffusers, network_on_meta

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Where a model's networks are in a file, by their names among the components. A file has one of each at most.
_DENOISERS = ("model.diffusion_model.", "")
_BLOCKS = {"unet": "input_blocks.", "transformer": "joint_blocks."}
_AUTOENCODERS = ("first_stage_model.", "vae.")
_TEXT_ENCODERS = {
    "text_encoder": (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
    ),
    "text_encoder_2": (
        "conditioner.embedders.1.model.",
        "conditioner.embedders.0.model.",
        "text_encoders.clip_g.transformer.",
    ),
    "text_encoder_3": ("text_encoders.t5xxl.transformer.",),
}
_OPEN_CLIP = ".model."  # ends the prefixes of encoders that are named as open_clip names them
_WITHOUT_PROJECTION = "text_encoders.clip_l.transformer."  # SD3 pools this encoder's text without one
_PROJECTIONS = ("text_projection.weight", "text_projection")  # which some programs save with every encoder
_AVERAGED = "model_ema."

# What is no weight: buffers that every library makes itself, and what only training reads.
_NO_WEIGHT = re.compile(r"(^|\.)(position_ids|logit_scale|attn_mask|v_pred|ztsnr)$|^(loss|model_ema)\.")
_QUANTIZED = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|weight_scale|comfy_quant|absmax|qweight|wscales|quant_state)\b"
)
_ADAPTER = re.compile(r"lora_|\.lora\.|lokr_|hada_w|dora_scale")
_CONTROL = re.compile(r"^control_model\.|(^|\.)(input_hint_block|controlnet_cond_embedding|controlnet_down_blocks)\.")
_DIFFUSERS = re.compile(r"^(down_blocks|up_blocks|transformer_blocks|(en|de)coder\.(down|up)_blocks)\.")
_AUTOENCODER_STARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# Tensors of complete encoders that a pipeline does not compute: SD 2 stops one layer before the last.
_LEFT_OUT = {*original.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE, _WITHOUT_PROJECTION + "text_projection.weight"}

_CONVERSION = (
    "import sys, torch, safetensors.torch as s;"
    " m = torch.load(open(sys.argv[1], 'rb'), map_location='cpu', weights_only=True);"
    " s.save_file({k: v.contiguous().clone() for k, v in m.get('state_dict', m).items() if torch.is_tensor(v)},"
    " sys.argv[2])"
)
_PICKLED = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})
_REFUSED = _PICKLED | {".gguf"}


@dataclass(frozen=True)
class ConvertedNetwork:
    """One network of a file, its tensors under the names that its library gives them.

    ``weights`` is what the library calls the network's file, without the suffix.
    """

    place: Path
    deferred: Mapping[str, DeferredTensor]
    weights: str

    @property
    def is_sharded(self) -> bool:
        """Returns False: it is one file."""
        return False

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Returns dtype and shape of every tensor; it is stored nowhere under this name."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return {name: StoredTensor(self.place, 0, names[t.dtype], t.shape) for name, t in self.forms.items()}

    @property
    def forms(self) -> dict[str, TensorForm]:
        """Returns dtype and shape of every tensor, to be written."""
        return {name: TensorForm(tensor.dtype, tuple(tensor.shape)) for name, tensor in self.deferred.items()}

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor in its own dtype, to the CPU. Raises InputError where a number is not finite."""
        return self.deferred[name].read()


class SingleFile:
    """A file that holds a denoiser under its original names, and maybe the other networks. Only the header is read.

    Attributes:
        path: the file.
        denoiser: its name among a pipeline's components.
    """

    def __init__(self, path: Path) -> None:
        """Recognizes a file.

        Raises:
            InputError: it is damaged, of another format, quantized, no Stable Diffusion model, or holds two.
        """
        self.path = path
        self._checkpoint = _opened(path)
        names = self._checkpoint.tensors
        _check_kind(path, names)

        def found(prefixes: Iterable[str], blocks: str = "") -> list[str]:
            return [prefix for prefix in prefixes if any(name.startswith(prefix + blocks) for name in names)]

        places = {component: found(_DENOISERS, blocks) for component, blocks in _BLOCKS.items()}
        denoisers = [component for component, prefixes in places.items() if prefixes]
        if not denoisers:
            raise InputError(f"{path} {_other_kind(names)}")
        places |= {part: found(prefixes) for part, prefixes in {"vae": _AUTOENCODERS, **_TEXT_ENCODERS}.items()}
        twice = [component for component, prefixes in places.items() if len(prefixes) > 1]
        if twice or len(denoisers) > 1:
            parts = " and ".join(denoisers if len(denoisers) > 1 else places[twice[0]])
            raise InputError(f"{path} holds two models ({parts}): give a file of one")
        self.denoiser = denoisers[0]
        self._prefixes = {component: prefixes[0] for component, prefixes in places.items() if prefixes}

    @property
    def components(self) -> tuple[str, ...]:
        """Returns the names that the networks in the file have among a pipeline's components."""
        return tuple(self._prefixes)

    def shape(self, ending: str) -> tuple[int, ...]:
        """Returns the shape of the denoiser's first tensor whose original name has this ending; () if there is none."""
        prefix, tensors = self._prefixes[self.denoiser], self._checkpoint.tensors
        return next((t.shape for n, t in tensors.items() if n.startswith(prefix) and n.endswith(ending)), ())

    @cached_property
    def prediction_type(self) -> str | None:
        """Returns the prediction type that the file itself names, or None."""
        with safe_open(self.path, "pt") as opened:
            said = (opened.metadata() or {}).get("modelspec.prediction_type")
        if "v_pred" in self._checkpoint.tensors or said == "v":
            return "v_prediction"
        return "epsilon" if said == "epsilon" else None

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Returns whether the file says that its last timestep is pure noise."""
        return "ztsnr" in self._checkpoint.tensors

    def convert(
        self, component: str, folder: Path, network_class: type[torch.nn.Module], *, averaged: bool = False
    ) -> ConvertedNetwork:
        """Translates one network.

        Args:
            component: one of :attr:`components`.
            folder: of the network's configuration.
            network_class: its class in diffusers or transformers.
            averaged: takes the denoiser's averaged weights (EMA) in place of its last ones.

        Raises:
            InputError: a tensor is missing, one too many, or not as the configuration says.
        """
        prefix = self._prefixes[component]
        names = {name.removeprefix(prefix): name for name in self._checkpoint.tensors if name.startswith(prefix)}
        if not prefix:  # of a denoiser alone; whatever else lies in the file begins with another component's prefix
            others = tuple(other for other in self._prefixes.values() if other)
            names = {name: full for name, full in names.items() if not full.startswith((*others, "model_ema."))}
        if averaged and component == self.denoiser:
            names = self._averaged(names)
        return _converted(component, prefix, names, self._checkpoint, folder, network_class)

    def _averaged(self, names: Mapping[str, str]) -> dict[str, str]:
        """Finds the averaged weights of a denoiser: their names have lost their dots."""
        stem = _AVERAGED + _DENOISERS[0].removeprefix("model.").replace(".", "")
        found = {name: stem + name.replace(".", "") for name in names}
        missing = next((other for other in found.values() if other not in self._checkpoint.tensors), None)
        if missing is not None:
            raise InputError(f"{self.path} lacks {missing}: it has no averaged weights (EMA), so leave --ema away")
        return found


def convert_autoencoder(file: Path, folder: Path, network_class: type[torch.nn.Module]) -> ConvertedNetwork:
    """Translates a file that holds an autoencoder alone, under its original names or diffusers'.

    Args:
        file: the file.
        folder: of the configuration.
        network_class: its class in diffusers.

    Raises:
        InputError: it is none, or not as the configuration says.
    """
    checkpoint = _opened(file)
    _check_kind(file, checkpoint.tensors)
    prefix = next((p for p in _AUTOENCODERS if any(name.startswith(p) for name in checkpoint.tensors)), "")
    names = {name.removeprefix(prefix): name for name in checkpoint.tensors if name.startswith(prefix)}
    names = {name: full for name, full in names.items() if name.startswith(_AUTOENCODER_STARTS)}
    if not names:
        raise InputError(f"{file} holds no autoencoder: give a VAE to --vae")
    return _converted("vae", "", names, checkpoint, folder, network_class)


def is_single_file(source: str) -> bool:
    """Tells whether a model is given as one file, also where it is of a kind that is refused, or is not there."""
    path = Path(source)
    return path.suffix.lower() in {".safetensors", *_REFUSED} and not path.is_dir()


def _opened(path: Path) -> Checkpoint:
    """Opens a file's header. Raises InputError for other formats, with how to convert a pickle."""
    try:
        with path.open("rb") as opened:
            start = opened.read(4)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from error
    suffix = path.suffix.lower()
    if suffix == ".gguf" or start == b"GGUF":
        raise InputError(f"{path} is GGUF, whose weights are quantized already: give the model in fp32, fp16 or bf16")
    if suffix in _PICKLED or start[:2] in {b"PK", b"\x80\x02"}:
        new = ".safetensors" if suffix in _PICKLED else ".converted.safetensors"
        given, made = shlex.quote(str(path)), shlex.quote(str(path.with_suffix(new)))
        raise InputError(
            f"{path} is a pickle, which may run code when it is loaded: refused; if you trust it, convert it:"
            f' python -c "{_CONVERSION}" {given} {made}'
        )
    return Checkpoint(path)


def _check_kind(path: Path, names: Iterable[str]) -> None:
    """Refuses files with tensors that no plain model has."""
    for pattern, what in (
        (_QUANTIZED, "its weights are quantized already: give the model in fp32, fp16 or bf16"),
        (_ADAPTER, "it is a LoRA, which is no model: give the model that it is for"),
        (_CONTROL, "it is a ControlNet, which is no model: give the model that it steers"),
    ):
        found = next((name for name in names if pattern.search(name)), None)
        if found is not None:
            raise InputError(f"{path} has a tensor {found}, so {what}")


def _other_kind(tensors: Mapping[str, StoredTensor]) -> str:
    """Says what a file without a denoiser is."""
    if any(name.startswith(_AUTOENCODERS) or name == "encoder.conv_in.weight" for name in tensors):
        return "is an autoencoder (VAE) without a denoiser: give a model, and this file to --vae"
    if any(_DIFFUSERS.match(name) for name in tensors):
        return "holds one network under diffusers' names: give the folder of its pipeline"
    if any(name.startswith(("text_model.", "encoder.block.", *sum(_TEXT_ENCODERS.values(), ()))) for name in tensors):
        return "is a text encoder without a denoiser: give a model"
    try:
        kind = original.infer_diffusers_model_type(dict(tensors))
    except Exception:  # of a file that has some of another model's tensors
        kind = "v1"
    if kind != "v1":  # which it answers where it knows nothing
        return f"is of the kind {kind}, which is not supported: give a model of Stable Diffusion 1, 2, XL or 3"
    first = ", ".join(list(tensors)[:2]) or "none"
    return f"is no Stable Diffusion model under its original names (its first tensors: {first})"


def _converted(
    component: str,
    prefix: str,
    names: Mapping[str, str],
    checkpoint: Checkpoint,
    folder: Path,
    network_class: Any,  # noqa: ANN401 - neither library is typed
) -> ConvertedNetwork:
    """Translates the tensors of one network and compares them with its configuration.

    Args:
        component: the network's name in its pipeline.
        prefix: of its original names in a whole model.
        names: its tensors' original names without prefix, and as they are in the file.
        checkpoint: the file.
        folder: of the configuration.
        network_class: in diffusers or transformers.
    """
    network = network_on_meta(folder, network_class)
    unused = () if hasattr(network, "text_projection") else _PROJECTIONS
    stored = {
        name: DeferredTensor.stored(full, checkpoint.form(full), checkpoint.read)
        for name, full in names.items()
        if not _NO_WEIGHT.search(name) and name not in unused
    }
    what = f"the {component} ({network_class.__name__}) of {folder / 'config.json'}"
    try:
        if is_of_diffusers(network_class):
            translated = _named_as_diffusers(network, stored)
        else:
            translated = _named_as_transformers(network, prefix, stored)
    except KeyError as error:
        raise InputError(
            f"{checkpoint.place} lacks {prefix}{error.args[0]} of {what}: it is not whole, or of another model"
        ) from error
    except Exception as error:  # shapes that it does not expect reach any code of diffusers
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{checkpoint.place} holds no tensors of {what} ({type(error).__name__}: {reason}): they are of two models"
        ) from error
    deferred = {name: DeferredTensor.of(tensor) for name, tensor in translated.items()}
    weights = DIFFUSERS_WEIGHTS if is_of_diffusers(network_class) else TRANSFORMERS_WEIGHTS
    converted = ConvertedNetwork(checkpoint.place, deferred, weights)
    check_network(folder, network_class, converted)
    read = frozenset[str]().union(*(tensor.sources for tensor in deferred.values()))
    left = sorted({names[name] for name in stored} - read - _LEFT_OUT)
    if left:
        raise InputError(f"{checkpoint.place} holds {left[0]}, which {what} has no place for: they are of two models")
    return converted


def _named_as_diffusers(network: Any, stored: dict[str, DeferredTensor]) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Names tensors as diffusers does; what has its names already keeps them."""
    if stored.keys() == network.state_dict().keys():
        return dict(stored)
    translate = SINGLE_FILE_LOADABLE_CLASSES[type(network).__name__]["checkpoint_mapping_fn"]
    start = "" if isinstance(network, AutoencoderKL) else original.LDM_UNET_KEY
    named: dict[str, torch.Tensor] = translate(
        checkpoint={start + name: tensor for name, tensor in stored.items()}, config=dict(network.config)
    )
    return named


def _named_as_transformers(network: Any, prefix: str, stored: dict[str, DeferredTensor]) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Names tensors of a text encoder as transformers does."""
    given = {prefix + name: tensor for name, tensor in stored.items()}
    named: dict[str, torch.Tensor]
    if prefix.endswith(_OPEN_CLIP):
        named = original.convert_open_clip_checkpoint(network, given, prefix)
    else:
        named = original.convert_ldm_clip_checkpoint(given, prefix)
    if prefix == _WITHOUT_PROJECTION:
        position = stored["text_model.embeddings.position_embedding.weight"]
        named["text_projection.weight"] = torch.eye(position.shape[-1], dtype=position.dtype)
    if not hasattr(network, "text_model"):
        named = {name.removeprefix("text_model."): tensor for name, tensor in named.items()}
    return named
