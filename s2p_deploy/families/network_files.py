"""Components of a pipeline's folder: their classes and configurations, and whether their files fit them.

Libraries draw weights that a file lacks by chance and only warn of it, so files are compared with the networks of their
configurations before a library loads them. Networks are made on the meta device, and only headers are read.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.errors import InputError
from s2p_deploy.families.checkpoint import (
    DIFFUSERS_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    Checkpoint,
    NetworkTensors,
    check_no_pointer,
)
from s2p_deploy.families.registry import network_config

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path


_INDEX, _CONFIG = "model_index.json", "config.json"
_MOST_TOKENS = 2**16
# Modules of the classes that an index names; the last is diffusers' name for those of its safety checker.
_LIBRARIES = {
    "diffusers": "diffusers",
    "transformers": "transformers",
    "stable_diffusion": "diffusers.pipelines.stable_diffusion",
}


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: the file holds none, or a number that is none (infinity is a bound in some configurations).
    """

    def constant(name: str) -> float:
        if name == "NaN":
            raise InputError(f"{file} holds NaN in place of a number: write the number")
        return float(name)

    try:
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=constant)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON") from error
    if not isinstance(data, dict):
        raise InputError(f"{file} must hold a JSON object")
    return data


def read_index(folder: Path) -> dict[str, Any]:
    """Reads which components a pipeline has, ``model_index.json``. Raises InputError as :func:`read_json`."""
    return read_json(folder / _INDEX)


def absent_components(index: Mapping[str, Any]) -> dict[str, None]:
    """Lists a pipeline's components that ``model_index.json`` names as absent, such as SD3's third text encoder.

    ``from_pretrained`` loads a pipeline without them only where they are passed as None.
    """
    return {name: None for name, entry in index.items() if entry == [None, None]}


def component_classes(folder: Path, kind: type = object) -> dict[str, type]:
    """Finds the classes of a pipeline's components, of those of a ``kind``, by their names.

    Raises:
        InputError: the index names a class that diffusers and transformers do not have.
    """
    index = read_index(folder)
    present = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry != [None, None]}
    classes = {name: _class(folder, name, entry) for name, entry in present.items()}
    return {name: found for name, found in classes.items() if issubclass(found, kind)}


def check_components(folder: Path, without: Collection[str] = ()) -> None:
    """Checks that the files of a pipeline's components are whole and those of their configurations.

    Args:
        folder: of the pipeline.
        without: components that are not looked at.

    Raises:
        InputError: a file is missing, damaged or a pointer of git-lfs; a network's file lacks a tensor, has one too
            many, or has one of another shape or of integers.
    """
    classes = component_classes(folder)
    for name, kind in classes.items():
        if name in without:
            continue
        if issubclass(kind, torch.nn.Module):
            check_network(folder / name, kind)
        elif hasattr(kind, "vocab_files_names"):
            _check_tokenizer(folder / name, kind.vocab_files_names)
            encoder = name.replace("tokenizer", "text_encoder")
            if encoder in classes:
                _check_vocabulary(folder / name, folder / encoder, read_config(folder / encoder, classes[encoder]))


def check_network(folder: Path, network_class: type[torch.nn.Module], checkpoint: NetworkTensors | None = None) -> None:
    """Checks that the files of one network are whole and those of its configuration.

    Args:
        folder: of the network.
        network_class: its class.
        checkpoint: tensors from elsewhere (None: those of the folder).

    Raises:
        InputError: as :func:`check_components`.
    """
    diffusers_has_it = is_of_diffusers(network_class)
    checkpoint = checkpoint or _checkpoint(folder, network_class)
    integers = {name: tensor for name, tensor in checkpoint.tensors.items() if not tensor.is_floating}
    floating = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in integers}
    given = {name: torch.empty(tensor.shape, device="meta") for name, tensor in floating.items()}
    compare = _compare_with_diffusers if diffusers_has_it else _compare_with_transformers
    found = compare(folder, network_class, checkpoint, given)
    place, what = checkpoint.place, f"the {folder.name} ({network_class.__name__})"
    # a library may call a tensor by a part of its name in the file
    wrong = next((stored for stored in integers if stored.endswith(tuple(found.missing))), None)
    if wrong is not None:
        raise InputError(f"{place}: {wrong} is {integers[wrong].dtype}, and {what} takes floating-point numbers")
    if found.missing:
        raise InputError(f"{place} lacks {_named(found.missing)} of {what}: get the whole file again")
    for name, (stored, own) in found.mismatched.items():
        raise InputError(f"{place}: {name} is {stored}, and {what} of {_CONFIG} takes {own}: they are of two models")
    if found.unexpected:
        raise InputError(
            f"{place} holds {_named(found.unexpected)}, which {what} of {_CONFIG} has no place for: they are of two"
            " models"
        )


def read_config(folder: Path, component_class: Any) -> dict[str, Any]:  # noqa: ANN401 - not typed
    """Reads a component's configuration as its library has it, with its defaults for what is absent.

    A text encoder's has ``hidden_size``, whatever the encoder calls it; what is no network has none.

    Raises:
        InputError: it cannot be read, or is none of that class.
    """
    if not issubclass(component_class, torch.nn.Module):
        return {}
    if is_of_diffusers(component_class):
        return network_config(network_on_meta(folder, component_class))
    read_json(folder / _CONFIG)
    with _explained(folder, component_class):
        config = component_class.config_class.from_pretrained(folder, local_files_only=True)
        read: dict[str, Any] = {"hidden_size": config.hidden_size} | config.to_dict()
        return read


def read_denoiser_config(folder: Path, pipeline_class: str, name: str) -> dict[str, Any]:
    """Reads the configuration of a pipeline's denoiser as the pipeline has it: some change it when they are made.

    Args:
        folder: of the pipeline.
        pipeline_class: name of its class in diffusers.
        name: of the denoiser among its components.

    Raises:
        InputError: it cannot be read, or is none of the denoiser's class.
    """
    import diffusers

    network_class, kind = component_classes(folder)[name], getattr(diffusers, pipeline_class)
    network = network_on_meta(folder / name, network_class)
    arguments = inspect.signature(kind).parameters
    # what has no default is a component: the denoiser alone is there
    given: dict[str, Any] = {
        key: None for key, argument in arguments.items() if argument.default is inspect.Parameter.empty
    }
    if "requires_safety_checker" in arguments:
        given["requires_safety_checker"] = False  # or a warning says that there is none
    with _explained(folder / name, network_class):
        return network_config(kind(**given | {name: network}).components[name])


def load_network(folder: Path, network_class: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401 - not typed
    """Loads one network on the CPU, with the weights of its file and no others.

    Raises:
        InputError: as :func:`check_network`, or its library cannot load it.
    """
    check_network(folder, network_class)
    with _explained(folder, network_class):
        network = network_class.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    check_finite(folder, network)
    return network


def check_finite(folder: Path, network: torch.nn.Module) -> None:
    """Checks that every weight of a network that was loaded from a folder is a number.

    Raises:
        InputError: one is NaN, or infinity.
    """
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            place, kind = _checkpoint(folder, type(network)).place, type(network).__name__
            raise InputError(
                f"{place}: {name} of the {folder.name} ({kind}) holds NaN or infinity as"
                f" {str(tensor.dtype).removeprefix('torch.')}: the file is broken, or of numbers beyond that type"
            )


def network_on_meta(folder: Path, network_class: Any) -> Any:  # noqa: ANN401 - neither library is typed
    """Makes a network on the meta device, from its folder's configuration.

    Raises:
        InputError: the configuration cannot be read, or is none of that class.
    """
    config = read_json(folder / _CONFIG)
    for name, argument in inspect.signature(network_class.__init__).parameters.items():
        number = isinstance(argument.default, int | float) and not isinstance(argument.default, bool)
        if number and isinstance(config.get(name), str):
            raise InputError(f"{folder / _CONFIG} has {name}={config[name]!r}: write a number")
    with _explained(folder, network_class), torch.device("meta"):
        if is_of_diffusers(network_class):
            return network_class.from_config(config)
        return network_class(network_class.config_class.from_pretrained(folder, local_files_only=True))


@dataclass(frozen=True)
class _Difference:
    """Names of tensors; the mismatched ones with their shapes in the file and in the network."""

    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[list[int], list[int]]]


def _compare_with_diffusers(
    folder: Path,
    network_class: Any,  # noqa: ANN401 - diffusers is not typed
    checkpoint: NetworkTensors,
    given: dict[str, torch.Tensor],
) -> _Difference:
    network = network_on_meta(folder, network_class)
    if not checkpoint.is_sharded:  # as diffusers has it: shards are younger than the names of attention that it renames
        network._fix_state_dict_keys_on_load(given)
    wanted = network.state_dict()
    ignored = network_class._keys_to_ignore_on_load_unexpected or ()
    unexpected = [name for name in sorted(given.keys() - wanted.keys()) if not any(re.search(p, name) for p in ignored)]
    both = sorted(given.keys() & wanted.keys())
    shapes = {name: (list(given[name].shape), list(wanted[name].shape)) for name in both}
    mismatched = {name: (stored, own) for name, (stored, own) in shapes.items() if stored != own}
    return _Difference(sorted(wanted.keys() - given.keys()), unexpected, mismatched)


def _compare_with_transformers(
    folder: Path,
    network_class: Any,  # noqa: ANN401 - transformers is not typed
    _checkpoint: NetworkTensors,
    given: dict[str, torch.Tensor],
) -> _Difference:
    read_json(folder / _CONFIG)
    with _explained(folder, network_class), _without_report():
        _, found = network_class.from_pretrained(
            None,
            config=network_class.config_class.from_pretrained(folder, local_files_only=True),
            state_dict=given,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    mismatched = {name: (list(stored), list(own)) for name, stored, own in sorted(found["mismatched_keys"])}
    return _Difference(sorted(found["missing_keys"]), sorted(found["unexpected_keys"]), mismatched)


def _check_tokenizer(folder: Path, names: Mapping[str, str]) -> None:
    """Checks the vocabulary of a tokenizer: without one, transformers makes a tokenizer that knows no word."""
    whole, parts = names.get("tokenizer_file"), [name for key, name in names.items() if key != "tokenizer_file"]
    files = [folder / whole] if whole is not None and (folder / whole).exists() else [folder / name for name in parts]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is missing: the {folder.name} has no vocabulary: get the whole pipeline")
    for file in (*files, *sorted(folder.glob("*.json"))):
        check_no_pointer(file)
        if file.suffix == ".json":
            read_json(file)


def _check_vocabulary(tokenizer: Path, encoder: Path, config: Mapping[str, Any]) -> None:
    """Checks that a text encoder has an embedding for every token that its tokenizer can give."""
    largest = max(_token_ids(tokenizer), default=-1)
    if largest >= config.get("vocab_size", largest + 1):
        raise InputError(
            f"{tokenizer} gives tokens up to {largest}, and {encoder} has embeddings of {config['vocab_size']}:"
            " they are of two models"
        )


def _token_ids(tokenizer: Path) -> Iterator[int]:
    """Yields the ids of a tokenizer's JSON files; those of others (SentencePiece) are not read."""
    whole, vocabulary = tokenizer / "tokenizer.json", tokenizer / "vocab.json"
    if whole.is_file():
        read = read_json(whole)
        words = read.get("model", {}).get("vocab", {})
        yield from words.values() if isinstance(words, dict) else range(len(words))
        yield from (token["id"] for token in read.get("added_tokens", []))
    elif vocabulary.is_file():
        yield from read_json(vocabulary).values()


def tokens_of(folder: Path) -> int:
    """Reads how many tokens a tokenizer makes of every text.

    Raises:
        InputError: its configuration does not say so, or no such number.
    """
    file = folder / "tokenizer_config.json"
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: get the whole pipeline")
    given = read_json(file).get("model_max_length") if file.is_file() else None
    try:
        tokens = int(given)  # type: ignore[arg-type]  # what is no number is refused here
    except (TypeError, ValueError, OverflowError):
        tokens = 0
    if not 1 <= tokens <= _MOST_TOKENS:
        raise InputError(
            f"{file} has model_max_length={given}, and every text is padded to that: write the encoder's length"
            " (CLIP: 77)"
        )
    return tokens


@contextmanager
def _explained(folder: Path, network_class: type) -> Iterator[None]:
    """Turns whatever a library raises over a configuration into one line."""
    try:
        yield
    except Exception as error:  # values of any kind reach any code of the library
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{folder / _CONFIG} makes no {network_class.__name__} ({type(error).__name__}: {reason})"
        ) from error


@contextmanager
def _without_report() -> Iterator[None]:
    """Silences transformers' report of what differs, and its progress bar: the difference becomes an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _class(folder: Path, name: str, entry: list[Any]) -> type:
    library, class_name = entry if len(entry) == 2 else ("", "")
    module = _LIBRARIES.get(str(library))
    found = None if module is None else getattr(importlib.import_module(module), str(class_name), None)
    if not isinstance(found, type):
        raise InputError(
            f"{folder / _INDEX}: the {name} is a {class_name} of {library}, which the installed libraries do not have:"
            " give a floating-point pipeline of diffusers"
        )
    return found


def is_of_diffusers(network_class: type) -> bool:
    """Tells networks of diffusers from those of transformers, as its safety checker is."""
    return network_class.__module__.startswith("diffusers.models.")


def _checkpoint(folder: Path, network_class: type) -> Checkpoint:
    return Checkpoint(folder, DIFFUSERS_WEIGHTS if is_of_diffusers(network_class) else TRANSFORMERS_WEIGHTS)


def _named(names: list[str]) -> str:
    """Names the first tensor and counts the others."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} others"
