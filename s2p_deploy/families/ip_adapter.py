"""IP-Adapter files: the image projection and the keys and values of every cross-attention, read and checked.

A file has two parts, as diffusers takes them: ``image_proj``, which makes image tokens of an image encoder's result,
and ``ip_adapter``, the matrices of attentions under odd numbers. Kinds differ in the first part alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open

from s2p_deploy.errors import InputError
from s2p_deploy.families.checkpoint import check_no_pointer
from s2p_deploy.records.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from s2p_deploy.families.model_family import Config

    # by ``image_proj`` and ``ip_adapter``, tensors by name
    IpAdapterWeights = Mapping[str, Mapping[str, Tensor]]

PROJECTION, MATRICES = "image_proj", "ip_adapter"
_PROCESSOR = ".attn2.processor"
_FACE_ID = ("perceiver_resampler.proj_in.weight", "norm.weight")  # the second of plain ones too
# What tells a kind of image projection, and the norm that ends it, as wide as the text.
_KINDS = (("proj.weight", "norm.weight"), ("proj.3.weight", "proj.3.weight"), ("latents", "norm_out.weight"))
_PLAIN_TOKENS, _FULL_TOKENS = 4, 257  # diffusers' numbers: files do not say them


def read_ip_adapter(file: Path) -> dict[str, dict[str, Tensor]]:
    """Reads an IP-Adapter's file as the mapping that diffusers' pipelines load.

    Raises:
        InputError: it is missing, pickled, damaged, or no IP-Adapter.
    """
    if not file.is_file():
        raise InputError(f"IP-Adapter {file} does not exist: give a .safetensors file")
    check_no_pointer(file)
    try:
        with safe_open(file, "pt"):
            tensors = TensorFile(file)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"IP-Adapter {file} is no whole safetensors file ({reason}): get it again; a pickled .bin, which can run"
            " code when it is read, must be converted where you trust it"
        ) from error
    parts: dict[str, dict[str, Tensor]] = {PROJECTION: {}, MATRICES: {}}
    for name in tensors.names:
        part, _, rest = name.partition(".")
        if part not in parts:
            raise InputError(f"IP-Adapter {file} has a tensor {name!r}: it is no IP-Adapter that diffusers reads")
        parts[part][rest] = tensors.read(name)
    return parts


def attention_frame(config: Config) -> UNet2DConditionModel:
    """Builds a UNet that has attentions and no weights: diffusers' code puts an IP-Adapter's processors into it."""
    with torch.device("meta"):
        frame: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
    for module in frame.modules():
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            delattr(module, name)
    return frame


def cross_attentions(frame: UNet2DConditionModel) -> list[str]:
    """Lists the cross-attentions' paths in the order of their numbers in files."""
    return [name.removesuffix(".processor") for name in frame.attn_processors if name.endswith(_PROCESSOR)]


def check_ip_adapter(weights: Any, name: str, attentions: Sequence[tuple[int, int]]) -> int:  # noqa: ANN401
    """Checks an IP-Adapter's weights, and returns the number of tokens that it makes of an image.

    Args:
        weights: ``image_proj`` and ``ip_adapter``, from wherever a user has them.
        name: of the adapter, for messages.
        attentions: the width of every cross-attention, and of the text that it reads.

    Raises:
        InputError: they are no such weights, of another model, not finite, or of a kind that is not supported.
    """
    projection, matrices = (_tensors(weights, part, name) for part in (PROJECTION, MATRICES))
    if _FACE_ID[0] in projection or any("_lora." in key for key in matrices) or _is_face_id(projection):
        raise InputError(f"IP-Adapter {name} is of the FaceID kind, which is not supported: use the plain or Plus kind")
    odd = next((key for part in (projection, matrices) for key, tensor in part.items() if not _is_finite(tensor)), None)
    if odd is not None:
        raise InputError(f"IP-Adapter {name}: {odd} is not finite everywhere: get the file again")
    wanted = {
        f"{2 * number + 1}.to_{side}_ip.weight": shape for number, shape in enumerate(attentions) for side in "kv"
    }
    found = {key: tuple(tensor.shape) for key, tensor in matrices.items()}
    wrong = next((key for key in sorted({*wanted, *found}) if wanted.get(key) != found.get(key)), None)
    if wrong is not None:
        raise InputError(
            f"IP-Adapter {name} is of another model: {wrong} is {_form(found.get(wrong))} there,"
            f" {_form(wanted.get(wrong))} here"
        )
    kind = next(((key, norm) for key, norm in _KINDS if key in projection), None)
    if kind is None or kind[1] not in projection:
        raise InputError(f"IP-Adapter {name}: its image projection is of no kind that is known")
    if tuple(projection[kind[1]].shape) != (attentions[0][1],):
        raise InputError(
            f"IP-Adapter {name} makes tokens of width {projection[kind[1]].numel()}, not {attentions[0][1]}"
        )
    if kind[0] == "latents":
        return int(projection["latents"].shape[1]) if projection["latents"].dim() == 3 else 0
    return _PLAIN_TOKENS if kind[0] == "proj.weight" else _FULL_TOKENS


def _tensors(weights: object, part: str, name: str) -> Mapping[str, Tensor]:
    found = weights.get(part) if isinstance(weights, Mapping) else None
    tensors = found if isinstance(found, Mapping) else {}
    if not tensors or not all(isinstance(each, torch.Tensor) for each in tensors.values()):
        raise InputError(f"IP-Adapter {name} has no tensors {part}: it is no IP-Adapter")
    return tensors


def _is_face_id(projection: Mapping[str, Tensor]) -> bool:
    return _FACE_ID[1] in projection and "proj.weight" not in projection


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(torch.isfinite(tensor).all())


def _form(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
