"""LoRA files: which layers of a pipeline a file changes, and by which matrices, whatever trainer wrote it.

A file's tensors are named in one of four layouts: PEFT's (``unet.….to_q.lora_A.weight``), kohya's
(``lora_unet_…_to_q.lora_down.weight``, also over the names of Stability's own code), and two older ones of diffusers
(``….to_q.lora.down.weight``, ``….processor.to_q_lora.down.weight``). Layers are found by their names in the pipeline's
own files, so no network is made. Matrices are read one layer at a time.
"""

from __future__ import annotations

import json
import math
import re
from copy import copy
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from s2p_deploy.errors import InputError
from s2p_deploy.families.checkpoint import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, Checkpoint, check_no_pointer
from s2p_deploy.families.checkpoint import DTYPES as CHECKPOINT_DTYPES
from s2p_deploy.families.network_files import component_classes
from s2p_deploy.records import file_digest
from s2p_deploy.records.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from torch import Tensor

    from s2p_deploy.families.pipelines import BasePipeline

    # by component, the shape of every layer's weight by the layer's path in the component's file
    Weights = Mapping[str, Mapping[str, tuple[int, ...]]]

WEIGHT = ".weight"  # ends the names of the tensors that low-rank products are added to
_MOST_RANK = 4096
_DENOISERS = ("unet", "transformer")
_PEFT_CONFIG = "adapter_config.json"
_DIFFUSERS_METADATA = "lora_adapter_metadata"  # the entry of a file's header in which diffusers keeps PEFT's settings
_TRAINED_FOR = ("modelspec.architecture", "ss_base_model_version")  # entries of headers that name the base model
_PICKLED = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
_READS_TEXT = re.compile(r"attn2[._](?:processor\.)?to_k\b.*(?:down\.weight|lora_A)|attn2_to_k\.lora_down")
_MODELS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}  # by the width of their text's states
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_PEFT_MAGNITUDE = "lora_magnitude_vector"
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32")  # the last two for an alpha

_PART = re.compile(
    r"(?P<layer>.+?)(?:"
    r"[._]lora[._](?P<side>down|up)\.weight"
    r"|\.lora_linear_layer\.(?P<old>down|up)\.weight"
    r"|\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"
    r"|(?:[._]lora\.down\.weight)?\.(?P<alpha>alpha)"  # diffusers leaves the matrix in names that it converts
    r"|\.(?P<magnitude>lora_magnitude_vector|dora_scale)(?:\.\w+)?(?:\.weight)?"
    r")"
)
_PREFIXES = {
    "lora_unet_": "denoiser",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "unet.": "unet",
    "transformer.": "transformer",
    "diffusion_model.": "denoiser",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoder.": "text_encoder",
}
# What a tensor's name tells of files that are something else, or adapters of a kind that is not read.
_OTHER_FILES = {
    "lora_controlnet": "a Control-LoRA",
    "controlnet": "a ControlNet",
    "control_model.": "a ControlNet",
    "input_hint_block": "a ControlNet",
    "adapter.body": "a T2I-Adapter",
    "adapter.conv_in": "a T2I-Adapter",
    "image_proj": "an IP-Adapter",
    "ip_adapter": "an IP-Adapter",
    "emb_params": "a textual inversion",
    "clip_l": "a textual inversion",
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "glora": "a GLoRA",
    "oft_": "an OFT adapter",
    "vera_lambda": "a VeRA",
    "ia3_": "an (IA)³",
    ".on_input": "an (IA)³",
    "model.diffusion_model.": "a whole checkpoint",
    "first_stage_model.": "a whole checkpoint",
}
_OTHER_PARTS = {
    "lora_mid.": "a LoCon with a core tensor",
    "lora_embedding_": "a LoRA of an embedding",
    "lora_B.bias": "a LoRA with a bias",
    "bundle_emb": "a bundled textual inversion",
    ".diff": "a whole difference",
    ".w_norm": "a norm's difference",
    ".b_norm": "a norm's difference",
    ".reshape_weight": "a LoRA that reshapes its layer",
}


@dataclass(frozen=True)
class GivenLora:
    """A LoRA as a user gives it: its file, and the weight with which it counts.

    Raises:
        InputError: the weight is not finite, or zero.
    """

    file: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise InputError(f"LoRA {self.file}: the weight {self.weight} must be a finite number other than 0")

    @staticmethod
    def parse(text: str) -> GivenLora:
        """Reads ``FILE`` or ``FILE:WEIGHT``.

        Example:
            >>> GivenLora.parse("ink.safetensors:0.8").weight
            0.8

        Raises:
            InputError: there is no file's name, or the weight is not finite, or zero.
        """
        file, colon, weight = text.rpartition(":")
        try:
            number = float(weight) if colon else 1.0
        except ValueError:
            file, colon, number = text, ":", 1.0  # a colon of the file's own name
        name = file if colon else weight
        if not name.strip() or text.endswith(":"):
            raise InputError(f"LoRA {text!r} must be FILE or FILE:WEIGHT, e.g. ink.safetensors:0.8")
        return GivenLora(Path(name), number)


@dataclass(frozen=True)
class LoraLayer:
    """One layer that a LoRA changes.

    Attributes:
        component: of the pipeline, such as ``unet``.
        path: of the layer in the component's file.
        rank: of the change.
        scale: what the product of the matrices is multiplied with, alpha / rank.
        down, up, magnitude: names of the tensors in the LoRA's file; only a DoRA has the last.
    """

    component: str
    path: str
    rank: int
    scale: float
    down: str
    up: str
    magnitude: str | None


@dataclass(frozen=True)
class LowRank:
    """The change of one layer's weight [out, in, ...]: ``scale * up @ down``, all float32 on the CPU.

    Attributes:
        down: [rank, in, ...], with the weight's own kernel.
        up: [out, rank].
        scale: alpha / rank.
        magnitude: [out], the norms that a DoRA gives the outputs' weights; None for every other LoRA.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None

    def difference(self) -> Tensor:
        """Computes the product [out, in, ...]."""
        product = (self.up @ self.down.flatten(1)) * self.scale
        return product.view(len(self.up), *self.down.shape[1:])


def check_low_rank(file: Path | str, layers: Iterable[LoraLayer]) -> None:
    """Checks that a LoRA's changes are low-rank products alone, which a branch beside a layer computes.

    Raises:
        InputError: it is a DoRA, which scales the whole weight.
    """
    scaling = next((layer for layer in layers if layer.magnitude is not None), None)
    if scaling is not None:
        raise InputError(
            f"{file} is a DoRA: it scales the whole weight of {scaling.path}, which no branch beside it can: fuse it"
            " (calibrate --lora, or adapt)"
        )


def fused_weight(weight: Tensor, changes: Iterable[tuple[LowRank, float]]) -> Tensor:
    """Adds LoRAs to a weight [out, in, ...], one after the other, each with its own weight; computed in float32.

    As PEFT has it, a DoRA's norms are those of the unchanged weight plus its own difference, which is what its weight
    multiplies: at a weight of 0 a DoRA still sets the magnitudes.
    """
    plain = weight.float()
    fused = plain
    for change, strength in changes:
        difference = change.difference().view_as(plain) * strength
        fused = fused + difference
        if change.magnitude is not None:
            norms = torch.linalg.vector_norm((plain + difference).flatten(1), dim=1)
            fused = fused * (change.magnitude / norms).view(-1, *[1] * (plain.dim() - 1))
    return fused


def component_checkpoints(base: BasePipeline) -> dict[str, Checkpoint]:
    """Opens the components that LoRAs are for: the denoiser and the text encoders."""
    names = {base.denoiser_folder.name: DIFFUSERS_WEIGHTS}
    networks = component_classes(base.folder, torch.nn.Module)
    names |= {name: TRANSFORMERS_WEIGHTS for name in networks if name.startswith("text_encoder")}
    return {name: Checkpoint(base.folder / name, weights) for name, weights in names.items()}


def changeable_weights(checkpoints: Mapping[str, Checkpoint]) -> Weights:
    """Finds the shapes of weights that a low-rank product can be added to, by component and path of their layer."""
    return {
        component: {
            name.removesuffix(WEIGHT): stored.shape
            for name, stored in checkpoint.tensors.items()
            if name.endswith(WEIGHT) and len(stored.shape) in {2, 4}
        }
        for component, checkpoint in checkpoints.items()
    }


def network_weights(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Finds the shapes of a network's weights that a low-rank product can be added to, by path of their layer."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.named_parameters() if name.endswith(WEIGHT)}
    return {name.removesuffix(WEIGHT): shape for name, shape in shapes.items() if len(shape) in {2, 4}}


class LoraInMemory:
    """The tensors of a LoRA that was read elsewhere, as diffusers hands them on.

    Args:
        tensors: by the names that a file would give them, alphas among them.
        settings: PEFT's, prefixed with their component.
    """

    def __init__(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        self._tensors, self.settings = tensors, settings
        self.names = tuple(tensors)

    def form(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Returns the dtype of a tensor, as safetensors names it, and its shape."""
        tensor = self._tensors[name]
        kind = next((kind for kind, dtype in CHECKPOINT_DTYPES.items() if dtype == tensor.dtype), str(tensor.dtype))
        return kind, tuple(tensor.shape)

    def read(self, name: str) -> Tensor:
        """Returns a tensor, on the CPU."""
        return self._tensors[name].detach().cpu()


class Lora:
    """A LoRA, held against a pipeline.

    Attributes:
        file: its path, or for one in memory its name.
        layers: what it changes, in the order of the pipeline's files.
    """

    def __init__(self, file: Path | str, weights: Weights, given: LoraInMemory | None = None) -> None:
        """Reads the file once, and finds the layers.

        Args:
            file: in safetensors.
            weights: of the pipeline, those of layers that can be changed.
            given: what is in memory already, so that no file is read.

        Raises:
            InputError: the file is no LoRA, not whole, pickled, or of a kind that is not read; a number is NaN or
                infinity; a tensor belongs to no layer of the pipeline, or does not fit it; it changes nothing.
        """
        self.file = file
        self._metadata: Mapping[str, str] = {}
        if given is None:
            path = Path(file)
            self._metadata = _metadata(path)
            self._tensors: TensorFile | LoraInMemory = TensorFile(path)
            self._settings = _PeftSettings(*_settings_of(path, self._metadata))
        else:
            self._tensors, self._settings = given, _PeftSettings(given.settings)
        self._check_numbers()
        parts = self._parts()
        finder = _LayerFinder(weights)
        found: dict[tuple[str, str], dict[str, str]] = {}
        for name, names in parts.items():
            places = finder.find(name)
            if len(places) != 1:
                self._refuse_layer(name, names, finder)
            if places[0] in found:
                raise InputError(f"{file} changes {places[0][1]} twice ({names['down']}): its names are of two layouts")
            found[places[0]] = names
        order = [(component, path) for component, layers in weights.items() for path in layers]
        self.layers = tuple(self._layer(*place, found[place], weights) for place in order if place in found)
        if not any(self._changes(layer) for layer in self.layers):
            raise InputError(f"{file} changes nothing: the product of every layer's matrices is zero")

    def digests(self) -> dict[str, str]:
        """Returns the SHA-256 of its file in hex, and of PEFT's settings beside it where they were read."""
        files = {"sha256": Path(self.file)} | ({} if self._settings.file is None else {"settings": self._settings.file})
        return {name: file_digest(file) for name, file in files.items()}

    def read(self, layer: LoraLayer) -> LowRank:
        """Reads the matrices of one of its layers."""
        down, up = self._tensor(layer.down), self._tensor(layer.up)
        magnitude = None if layer.magnitude is None else self._tensor(layer.magnitude).flatten()
        return LowRank(down, up.view(-1, layer.rank), layer.scale, magnitude)

    def in_memory(self, components: Collection[str]) -> Lora:
        """Returns its part that changes ``components``, in memory, so that the file is not needed again."""
        part = copy(self)
        part.layers = tuple(layer for layer in self.layers if layer.component in components)
        names = [name for layer in part.layers for name in (layer.down, layer.up, layer.magnitude) if name is not None]
        part._tensors = LoraInMemory({name: self._tensors.read(name) for name in names}, {})
        return part

    def _tensor(self, name: str) -> Tensor:
        """Reads a tensor as float32.

        NumPy casts: PyTorch's threads wait for one another at each of hundreds of small tensors, which takes seconds
        where the processors have other work.
        """
        stored = self._tensors.read(name)
        flat = stored.contiguous().view(-1)
        if stored.dtype == torch.bfloat16:  # NumPy lacks it: the upper half of a float32
            values = (flat.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)
        else:
            values = flat.numpy().astype(np.float32)
        return torch.from_numpy(values).view(stored.shape)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.form(name)[1]

    def _changes(self, layer: LoraLayer) -> bool:
        if layer.magnitude is not None:
            return True
        return layer.scale != 0 and all(bool(self._tensor(name).any()) for name in (layer.up, layer.down))

    def _check_numbers(self) -> None:
        for name in self._tensors.names:
            dtype = self._tensors.form(name)[0]
            if dtype not in _DTYPES:
                raise InputError(f"{self.file}: {name} is {dtype}: give a LoRA in {', '.join(_DTYPES[:4])}")
            if not np.isfinite(self._tensor(name).numpy()).all():
                raise InputError(f"{self.file}: {name} holds NaN or infinity: get the file again, or train it again")

    def _parts(self) -> dict[str, dict[str, str]]:
        """Groups the tensors by the layer's name in the file: ``down``, ``up``, ``alpha``, ``magnitude``.

        Raises:
            InputError: a name is of no layout that is read, or a layer lacks a matrix.
        """
        parts: dict[str, dict[str, str]] = {}
        left = []
        for name in self._tensors.names:
            match = _PART.fullmatch(name)
            if match is None:
                left.append(name)
                continue
            side = {"A": "down", "B": "up"}.get(match["peft"] or "", match["side"] or match["old"])
            kind = side or ("alpha" if match["alpha"] else "magnitude")
            twin = parts.setdefault(match["layer"], {}).setdefault(kind, name)
            if twin != name:
                raise InputError(f"{self.file} changes {match['layer']} twice: by {twin} and by {name}")
        if left or not parts:
            self._refuse_names(left, parts)
        for names in parts.values():
            for needed in ("down", "up"):
                if needed not in names:
                    present = next(iter(names.values()))
                    raise InputError(
                        f"{self.file} has {present} without the {needed} matrix of that layer: get it again"
                    )
        return parts

    def _refuse_names(self, left: Sequence[str], parts: Mapping[str, dict[str, str]]) -> NoReturn:
        for sign, what in (_OTHER_FILES | _OTHER_PARTS).items():
            name = next((name for name in left if sign in name), None)
            if name is not None:
                raise InputError(f"{self.file} is or holds {what} ({name}): only LoRA, LoCon and DoRA are read")
        if not parts:
            example = f" ({left[0]})" if left else ""
            raise InputError(f"{self.file} is no LoRA: none of its tensors{example} is a down or an up matrix")
        more = f" and {len(left) - 1} others" if len(left) > 1 else ""
        raise InputError(f"{self.file} holds {left[0]}{more}, which no layout of LoRAs that is read has: refused")

    def _refuse_layer(self, name: str, names: Mapping[str, str], finder: _LayerFinder) -> NoReturn:
        where, places = finder.component(name), finder.find(name)
        if places:
            either = " or the ".join(component for component, _ in places)
            raise InputError(
                f"{self.file}: {names['down']} could belong to the {either}: begin its name with one of them"
            )
        place = f"a {where}, which it lacks" if where and where not in finder.known else "no layer of it"
        raise InputError(
            f"{self.file} is for another model than this pipeline{self._trained_for()}:"
            f" {names['down']} belongs to {place}"
        )

    def _trained_for(self) -> str:
        """Names the model that a LoRA was trained for, where its header or the width of its text tells."""
        known = next((self._metadata[key] for key in _TRAINED_FOR if self._metadata.get(key)), None)
        if known is not None:
            return f" (its header says {known[:60]})"
        read = [self._shape(name) for name in self._tensors.names if _READS_TEXT.search(name)]
        widths = [_MODELS[shape[1]] for shape in read if len(shape) > 1 and shape[1] in _MODELS]
        return f" (it reads the text of {widths[0]})" if widths else ""

    def _layer(self, component: str, path: str, names: Mapping[str, str], weights: Weights) -> LoraLayer:
        down, up = self._shape(names["down"]), self._shape(names["up"])
        weight = weights[component][path]
        rank = down[0] if down else 0
        if not 0 < rank <= _MOST_RANK:
            raise InputError(f"{self.file}: {names['down']} is {list(down)}: a rank must be 1 to {_MOST_RANK}")
        fits = _without_ones(down[1:]) == _without_ones(weight[1:])
        if not fits or _without_ones(up) != _without_ones((weight[0], rank)):
            raise InputError(
                f"{self.file} is for another model than this pipeline{self._trained_for()}: {names['down']} and its up"
                f" matrix are {list(down)} and {list(up)}, and {path} of the {component} is {list(weight)}"
            )
        magnitude = names.get("magnitude")
        # PEFT's magnitudes of a convolution are [1, out, 1, 1]; LyCORIS means inputs by that
        of_peft = magnitude is not None and _PEFT_MAGNITUDE in magnitude
        if magnitude is not None and _without_ones(self._shape(magnitude), leading=of_peft) != (weight[0],):
            raise InputError(
                f"{self.file}: {magnitude} is {list(self._shape(magnitude))}: only a DoRA with one magnitude for each"
                f" output, here {weight[0]}, is read"
            )
        return LoraLayer(component, path, rank, self._scale(path, rank, names), names["down"], names["up"], magnitude)

    def _scale(self, path: str, rank: int, names: Mapping[str, str]) -> float:
        """Finds alpha / rank: from the layer's own tensor, from PEFT's settings, or 1 where neither is there."""
        if "alpha" in names:
            alpha = self._tensor(names["alpha"])
            if alpha.numel() != 1:
                raise InputError(f"{self.file}: {names['alpha']} is {list(alpha.shape)}: an alpha is one number")
            return float(alpha) / rank
        return self._settings.scale(names["down"], path, rank)


@dataclass(frozen=True)
class _PeftSettings:
    """PEFT's ``LoraConfig`` as JSON: diffusers prefixes every key with its component. ``file`` is where it stood."""

    values: Mapping[str, Any]
    file: Path | None = None

    def scale(self, name: str, path: str, rank: int) -> float:
        """Computes alpha / rank of a layer, or alpha / √rank where it was trained so; 1 without an alpha."""
        prefix = next((each for each in _PREFIXES if name.startswith(each) and f"{each}lora_alpha" in self.values), "")
        alpha = self.values.get(f"{prefix}lora_alpha")
        patterns = self.values.get(f"{prefix}alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(re.fullmatch(r"\^?[\w.]+", key) for key in patterns):
            raise InputError(f"the settings of {name} have an alpha_pattern of other than layers' names: refused")
        named = next((own for key, own in patterns.items() if _ends_with(path, key)), alpha)
        if named is None:
            return 1.0
        try:
            number = float(named) if isinstance(named, int | float) else math.nan
        except OverflowError:  # JSON's integers have any size
            number = math.inf
        if not math.isfinite(number):
            raise InputError(f"the settings of {name} have lora_alpha {named!r:.60}: an alpha is one finite number")
        return number / (rank**0.5 if self.values.get(f"{prefix}use_rslora") else rank)


def _ends_with(path: str, pattern: str) -> bool:
    """Tells whether PEFT takes a key of its patterns for a layer: parts at the end of its path, or after ^ all."""
    path, own = (each.removeprefix("text_model.") for each in (path, pattern.removeprefix("^")))
    return path == own or (not pattern.startswith("^") and path.endswith(f".{own}"))


class _LayerFinder:
    """Finds layers by the names that files give them."""

    def __init__(self, weights: Weights) -> None:
        self.known = tuple(weights)
        self._paths = {component: _paths_by_name(layers) for component, layers in weights.items()}

    def component(self, name: str) -> str | None:
        """Returns the component that a name in a file begins with, if it does."""
        plain = name.removeprefix("base_model.model.")
        found = next((component for prefix, component in _PREFIXES.items() if plain.startswith(prefix)), None)
        return next((each for each in _DENOISERS if each in self.known), "unet") if found == "denoiser" else found

    def find(self, name: str) -> list[tuple[str, str]]:
        """Returns component and path of every layer that a name in a file could mean."""
        plain = name.removeprefix("base_model.model.")
        named = self.component(name)
        prefix = next((each for each in _PREFIXES if plain.startswith(each)), "")
        key = _key(plain.removeprefix(prefix))
        components = self.known if named is None else (named,)
        return [(each, self._paths[each][key]) for each in components if key in self._paths.get(each, {})]


def _paths_by_name(layers: Iterable[str]) -> dict[str, str]:
    """Maps every name that files have for a layer, with ``_`` for ``.``, to its path."""
    paths = list(layers)
    names = {_key(path): path for path in paths}
    ours = {name: path for path, name in _stability_names(paths).items()}
    # older layouts leave the index out, and call the projections of a text encoder as those of a UNet
    shortened = {_key(path.removesuffix(".0")): path for path in paths if path.endswith(".to_out.0")}
    clip = {_key(re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", path)): path for path in paths if path.endswith("_proj")}
    return clip | shortened | ours | names


def _key(path: str) -> str:
    # transformers left out the first part of CLIP's paths, which files still have
    return path.replace(".processor.", ".").replace(".", "_").removeprefix("text_model_")


def _stability_names(paths: Sequence[str]) -> dict[str, str]:
    """Names a UNet's layers as Stability's code does, on which kohya's scripts train SDXL, with ``_`` for ``.``."""
    blocks = _stability_blocks(paths)
    inner = {
        "conv1": "in_layers_2",
        "time_emb_proj": "emb_layers_1",
        "conv2": "out_layers_3",
        "conv_shortcut": "skip_connection",
    }
    ends = {
        "conv_in": "input_blocks_0_0",
        "conv_out": "out_2",
        "time_embedding.linear_1": "time_embed_0",
        "time_embedding.linear_2": "time_embed_2",
        "add_embedding.linear_1": "label_emb_0_0",
        "add_embedding.linear_2": "label_emb_0_2",
    }
    names = {path: ends[path] for path in paths if path in ends}
    for path in paths:
        block = next((each for each in blocks if path.startswith(f"{each}.")), None)
        if block is not None:
            rest = path.removeprefix(f"{block}.")
            rest = "op" if ".downsamplers." in path else inner.get(rest, rest)
            names[path] = f"{blocks[block]}_{_key(rest)}"
    return names


def _stability_blocks(paths: Iterable[str]) -> dict[str, str]:
    """Numbers a UNet's resnets, attentions and resamplers as Stability's code does: in the order of the data."""
    there = {".".join(path.split(".")[: 3 if path.startswith("mid_block.") else 4]) for path in paths}
    blocks = {"mid_block.resnets.0": "middle_block_0", "mid_block.attentions.0": "middle_block_1"}
    blocks["mid_block.resnets.1"] = "middle_block_2"
    for side, name, resampler, start in (
        ("down_blocks", "input_blocks", "downsamplers.0", 1),
        ("up_blocks", "output_blocks", "upsamplers.0", 0),
    ):
        number = start
        for block in count():
            if f"{side}.{block}.resnets.0" not in there:
                break
            layers = [layer for layer in range(len(there)) if f"{side}.{block}.resnets.{layer}" in there]
            for layer in layers:
                blocks[f"{side}.{block}.resnets.{layer}"] = f"{name}_{number + layer}_0"
                blocks[f"{side}.{block}.attentions.{layer}"] = f"{name}_{number + layer}_1"
            number += len(layers)
            if side == "down_blocks":
                blocks[f"{side}.{block}.{resampler}"] = f"{name}_{number}_0"
                number += 1
            else:
                place = 2 if f"{side}.{block}.attentions.0" in there else 1
                blocks[f"{side}.{block}.{resampler}"] = f"{name}_{number - 1}_{place}"
    return {path: name for path, name in blocks.items() if path in there}


def _without_ones(shape: Sequence[int], *, leading: bool = False) -> tuple[int, ...]:
    """Drops the sizes of 1 at the end of a shape; ``leading`` those at its start too."""
    sizes = list(shape)
    while len(sizes) > 1 and sizes[-1] == 1:
        sizes.pop()
    while leading and len(sizes) > 1 and sizes[0] == 1:
        sizes.pop(0)
    return tuple(sizes)


def _metadata(file: Path) -> dict[str, str]:
    """Checks that a file is whole and safe to read, and returns the text that stands in its header."""
    if not file.is_file():
        raise InputError(f"LoRA {file} does not exist: give a .safetensors file")
    check_no_pointer(file)
    try:
        with safe_open(file, "pt") as whole:
            return dict(whole.metadata() or {})
    except (SafetensorError, OSError) as error:
        with file.open("rb") as opened:
            start = opened.read(len(_ZIP))
        if file.suffix.lower() in _PICKLED or start == _ZIP or start[:1] == _PICKLE:
            raise InputError(
                f"LoRA {file} is pickled, which can run code when it is read: convert it to safetensors where you trust"
                " it"
            ) from error
        reason = " ".join(str(error).split())
        raise InputError(f"LoRA {file} is damaged or not whole ({reason}): get it again") from error


def _settings_of(file: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], Path | None]:
    """Finds PEFT's settings, in a LoRA's header or in a file beside it, and that file."""
    beside = file.with_name(_PEFT_CONFIG)
    if _DIFFUSERS_METADATA in metadata:
        return _parsed(metadata[_DIFFUSERS_METADATA].encode(), file), None
    if file.name.startswith("adapter_model") and beside.is_file():
        try:
            data = beside.read_bytes()
        except OSError as error:
            raise InputError(f"{beside} cannot be read ({error.strerror}): get the LoRA again") from error
        return _parsed(data, beside), beside
    return {}, None


def _parsed(data: bytes, file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(data.decode())
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or too deep or long for Python
        reason = type(error).__name__
        raise InputError(f"{file}: PEFT's settings are no JSON ({reason}): get the LoRA again") from error
    if not isinstance(settings, dict):
        raise InputError(f"{file}: PEFT's settings must be a JSON object: get the LoRA again")
    return settings
