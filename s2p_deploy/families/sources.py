"""Where a pipeline comes from: a folder, a hub, or a single file, brought into one folder in diffusers' format."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.errors import InputError
from s2p_deploy.families.assembled import Assembly, assembled, pipeline_digest, pipeline_files
from s2p_deploy.families.checkpoint import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, check_no_pointer, weight_map
from s2p_deploy.families.network_files import component_classes, is_of_diffusers, read_index, read_json
from s2p_deploy.families.single_file import SingleFile, convert_autoencoder, is_single_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from s2p_deploy.records import BaseOptions

BUNDLED = "shapes"
_TEXTS = ("*.json", "*/*.json", "*/*.txt", "*/*.model")
_WHOLE = (*_TEXTS, "*/*.safetensors")
PACKAGED = Path(str(resources.files("s2p_deploy"))) / "families" / "configurations"
_VOCABULARY = tuple(PACKAGED / "clip_tokenizer" / name for name in ("vocab.json", "merges.txt"))
_SD3_MEDIUM = (1536, 4096)  # shape of the weight that takes text in
_UNETS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # by the width of the text that they read
# No single file has them, and diffusers' from_single_file leaves them out too.
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
_ASK = "give the diffusers folder, or hub id, of such a model to --components"


@dataclass(frozen=True)
class Found:
    """A pipeline's folder and digest, and the digest of the single file that it was made of."""

    folder: Path
    digest: str
    file: str | None = None


def find_pipeline(source: str, options: BaseOptions) -> Found:
    """Finds the folder of a pipeline; makes it in the cache where a file or an option asks for another than there is.

    Args:
        source: ``shapes`` (bundled), a folder, a hub id, which is downloaded, or a single file.
        options: how to read it.

    Raises:
        InputError: there is no such pipeline, or an option does not fit it.
        IntegrityError: what the cache has was changed.
    """
    if is_single_file(source):
        file = Path(source)
        of_file = assembly_of_file(SingleFile(file), options)
        return Found(*assembled(of_file), of_file.digest_of(file))
    if options.components is not None or options.ema:
        given = "--ema" if options.ema else "--components"
        raise InputError(f"{given} is for a single file, and {source} is a whole pipeline: leave it away")
    folder = _locate(source)
    assembly = _of_folder(folder, options)
    return Found(folder, pipeline_digest(folder)) if assembly is None else Found(*assembled(assembly))


def _of_folder(folder: Path, options: BaseOptions) -> Assembly | None:
    """Says what of a pipeline's folder is read; None: all as it is."""
    networks = component_classes(folder, torch.nn.Module)
    weights = {name: _weight_files(folder / name, kind, options.variant) for name, kind in networks.items()}
    renamed = [name for name, files in weights.items() if any(path.name != file for file, path in files.items())]
    if options.variant is not None and not renamed:
        raise InputError(f"{folder} has no files of the variant {options.variant!r}: leave --variant away")
    if not renamed and options.vae is None and options.prediction_type is None:
        return None
    card = folder / "README.md"
    whole = [*pipeline_files(folder), *([card] if card.is_file() else [])]
    assembly = Assembly({path.relative_to(folder).as_posix(): path for path in whole})
    for name in renamed:
        assembly.drop(name)
        assembly.put(name, {"config.json": folder / name / "config.json"} | weights[name])
    _apply(assembly, folder, options, options.prediction_type)
    return assembly


def assembly_of_file(file: SingleFile, options: BaseOptions) -> Assembly:
    """Says which folder a single file becomes: of its networks, and of what it lacks from elsewhere.

    Raises:
        InputError: it lacks something, or is not what its configuration says.
    """
    prediction_type = options.prediction_type or file.prediction_type
    packaged = options.components is None
    configuration = _packaged(file, prediction_type) if packaged else _locate(str(options.components), _TEXTS)
    classes = {name: kind for name, kind in component_classes(configuration).items() if name not in _LEFT_OUT}
    _check_same_model(file, classes, configuration)
    networks = {name for name, kind in classes.items() if issubclass(kind, torch.nn.Module)}
    own = {name for name in file.components if name in networks and not (name == "vae" and options.vae)}
    lacking = sorted(networks - own - ({"vae"} if options.vae else set()))
    if lacking and packaged:
        other = ", or an autoencoder to --vae" if lacking == ["vae"] else ""
        raise InputError(f"{file.path} has no {lacking[0]}: {_ASK}{other}")
    if lacking:
        _locate(str(options.components), [f"{name}/*.safetensors" for name in lacking])
    assembly = Assembly(texts={"model_index.json": _index(configuration)})
    if (configuration / "sampling.json").is_file():
        assembly.files["sampling.json"] = configuration / "sampling.json"
    for name, kind in classes.items():
        folder = configuration / name
        if name not in networks:
            assembly.put(name, {path.name: path for path in _texts(folder, kind)})
            continue
        assembly.put(name, {"config.json": folder / "config.json"})
        if name in own:
            network = file.convert(name, folder, kind, averaged=options.ema)
            assembly.networks[f"{name}/{network.weights}.safetensors"] = network
        elif name in lacking:
            assembly.put(name, _weight_files(folder, kind, options.variant, needed=f"{file.path} has no {name}"))
    _apply(assembly, configuration, options, prediction_type, zero_snr=file.has_zero_terminal_snr)
    return assembly


def _packaged(file: SingleFile, prediction_type: str | None) -> Path:
    """Chooses the packaged configuration of a file. Raises InputError where there is none."""
    if file.denoiser == "transformer":
        name = "sd3-medium" if file.shape("context_embedder.weight") == _SD3_MEDIUM else None
    else:
        name = next((_UNETS[width] for width in file.shape("attn2.to_k.weight")[1:] if width in _UNETS), None)
    if name is None:
        raise InputError(f"{file.path}: no packaged configuration has such a {file.denoiser}: {_ASK}")
    if name == "sd2":
        if prediction_type is None:
            raise InputError(
                f"{file.path} is of SD 2, which predicts either noise or v, and does not say which: give"
                " --prediction-type epsilon (trained on 512 pixels) or v_prediction (768)"
            )
        name += f"-{prediction_type}"
    return PACKAGED / name


def _check_same_model(file: SingleFile, classes: Mapping[str, type], configuration: Path) -> None:
    """Checks that a file's networks are components of the pipeline that a configuration describes."""
    kind = read_index(configuration).get("_class_name")
    for name in file.components:
        if name in classes:
            continue
        if name != "text_encoder_3":
            raise InputError(
                f"{file.path} has a {name}, and {configuration}, a {kind}, has none: they are of two models"
            )
        if configuration.parent == PACKAGED:  # other folders may leave T5 away on purpose
            raise InputError(f"{file.path} has a {name} (T5), whose tokenizer is not packaged: {_ASK}")


def _index(configuration: Path) -> str:
    """Formats ``model_index.json`` without the components that single files have not."""
    index = read_index(configuration)
    index |= {name: [None, None] for name in _LEFT_OUT if name in index}
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    return json.dumps(index, indent=1) + "\n"


def _texts(folder: Path, kind: Any) -> list[Path]:  # noqa: ANN401 - neither library is typed
    """Lists the files of a tokenizer or scheduler; packaged tokenizers share one vocabulary."""
    own = [path for path in sorted(folder.glob("*")) if path.suffix in {".json", ".txt", ".model"}]
    shared = folder.parent.parent == PACKAGED and hasattr(kind, "vocab_files_names")
    return [*own, *(_VOCABULARY if shared else ())]


def _weight_files(folder: Path, kind: type, variant: str | None, *, needed: str | None = None) -> dict[str, Path]:
    """Finds a network's files by the names that they have without a variant.

    Args:
        folder: of the network.
        kind: its class.
        variant: of which they shall be; those without one where it has none. None: as they are, or the only variant.
        needed: why they must be there.

    Raises:
        InputError: there are several variants and none was asked for, a shard is missing, or there are none.
    """
    stem = DIFFUSERS_WEIGHTS if is_of_diffusers(kind) else TRANSFORMERS_WEIGHTS
    names = sorted(path.name for path in folder.glob(f"{stem}*"))
    plain = [name for name in names if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)]
    pattern = re.compile(rf"{stem}\.(?:(\w+)\.safetensors|safetensors\.index\.(\w+)\.json)")
    variants = sorted({found[1] or found[2] for name in names if (found := pattern.fullmatch(name))})
    if not plain and variants and variant not in variants:
        if len(variants) > 1:
            raise InputError(f"{folder} has its weights as {' and '.join(variants)} alone: give one to --variant")
        variant = variants[0]
    if variant not in variants:
        if needed is not None and not plain:
            raise InputError(f"{needed}, and neither has {folder}: give a whole pipeline to --components")
        return {name: folder / name for name in plain}
    file, index = folder / f"{stem}.{variant}.safetensors", folder / f"{stem}.safetensors.index.{variant}.json"
    chosen = {f"{stem}.safetensors": file}
    if not file.is_file():
        chosen = {f"{stem}.safetensors.index.json": index}
        chosen |= {name: folder / name for name in set(weight_map(index).values())}
    for path in chosen.values():
        check_no_pointer(path)
    return chosen


def _apply(
    assembly: Assembly,
    configuration: Path,
    options: BaseOptions,
    prediction_type: str | None,
    *,
    zero_snr: bool = False,
) -> None:
    """Puts another autoencoder in, and what the scheduler shall predict."""
    if options.vae is not None:
        _put_autoencoder(assembly, configuration, Path(options.vae), options.variant)
    changes: dict[str, Any] = {} if prediction_type is None else {"prediction_type": prediction_type}
    if zero_snr:
        changes["rescale_betas_zero_snr"] = True
    if not changes:
        return
    scheduler: Any = component_classes(configuration)["scheduler"]
    unknown = next((key for key in changes if key not in inspect.signature(scheduler.__init__).parameters), None)
    if unknown is not None:
        raise InputError(
            f"{configuration} has a {scheduler.__name__}, which has no {unknown}: it cannot be {changes[unknown]}"
        )
    name = "scheduler/scheduler_config.json"
    assembly.files.pop(name, None)
    assembly.texts[name] = json.dumps(read_json(configuration / name) | changes, indent=1) + "\n"


def _put_autoencoder(assembly: Assembly, configuration: Path, place: Path, variant: str | None) -> None:
    """Replaces the autoencoder by one of a file, of its own folder, or of a pipeline's folder."""
    kind = component_classes(configuration)["vae"]
    if not place.is_dir():
        assembly.drop("vae")
        assembly.put("vae", {"config.json": configuration / "vae" / "config.json"})
        network = convert_autoencoder(place, configuration / "vae", kind)
        assembly.networks[f"vae/{network.weights}.safetensors"] = network
        return
    folder = next((one for one in (place, place / "vae") if (one / "config.json").is_file()), None)
    if folder is None:
        raise InputError(f"{place} has no config.json of an autoencoder: give the folder of one, or a file, to --vae")
    assembly.drop("vae")
    weights = _weight_files(folder, kind, variant, needed="the pipeline's own autoencoder is not used")
    assembly.put("vae", {"config.json": folder / "config.json"} | weights)


def _locate(source: str, patterns: Sequence[str] = _WHOLE) -> Path:
    """Finds the folder of a pipeline; downloads the files that match where ``source`` is a hub id."""
    if source == BUNDLED:
        return Path(str(resources.files("s2p_deploy") / "shapes" / "pipeline"))
    if not source.strip():
        raise InputError(f"the model is empty: give a diffusers folder, a hub id (owner/name), or {BUNDLED!r}")
    path = Path(source)
    if (path / "model_index.json").is_file():
        return path
    if path.exists():
        what = ", and no .safetensors file" if path.is_file() else ": it has no model_index.json"
        raise InputError(f"{source} is no diffusers pipeline{what}")
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise InputError(
            f"model {source!r} does not exist: give a folder in diffusers format, a .safetensors file, a hub id"
            f" (owner/name), or {BUNDLED!r}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"model {source!r} is neither a local folder nor reachable on the hub ({type(error).__name__})"
        ) from error
