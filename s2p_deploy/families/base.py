"""The floating-point pipeline that everything starts from: found, checked, digested, loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families.kinds import kind_of_config
from s2p_deploy.records import Base, file_digest

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch
    from diffusers import DiffusionPipeline

    from s2p_deploy.families.network_kind import Config, NetworkKind
    from s2p_deploy.records import Manifest

BUNDLED = "shapes"
_PIPELINES = {  # and the name of the denoiser among their components
    "StableDiffusionPipeline": "unet",
    "StableDiffusionXLPipeline": "unet",
    "StableDiffusion3Pipeline": "transformer",
}
_ALLOWED_SUFFIXES = {".json", ".safetensors", ".txt", ".model"}
_CODE_KEYS = ("custom_pipeline", "auto_map", "_attn_implementation_internal")


@dataclass(frozen=True)
class BasePipeline:
    """A diffusers pipeline on disk. ``default_guidance`` is what it is meant to be sampled with."""

    folder: Path
    base: Base
    default_guidance: float
    pipeline_class: str = "StableDiffusionPipeline"

    @property
    def denoiser_folder(self) -> Path:
        """Where the denoiser's configuration and weights are."""
        return self.folder / _PIPELINES[self.pipeline_class]

    @property
    def kind(self) -> NetworkKind:
        """The kind of its denoiser."""
        return kind_of_config(self.denoiser_config())

    def denoiser_config(self) -> Config:
        """The denoiser's diffusers configuration."""
        return read_json(self.denoiser_folder / "config.json")


def resolve_base(source: str) -> BasePipeline:
    """Finds a pipeline: ``shapes`` (bundled), a local folder, or a Hugging Face hub id.

    Raises:
        InputError: there is no such pipeline, it is no Stable Diffusion pipeline of diffusers, or its configuration
            asks for code to be run.
    """
    folder = _locate(source)
    index = read_json(folder / "model_index.json")
    pipeline_class = str(index.get("_class_name"))
    if pipeline_class not in _PIPELINES:
        raise InputError(f"{source} is a {pipeline_class}: supported pipelines are {', '.join(sorted(_PIPELINES))}")
    check_no_code(folder)
    hints = folder / "sampling.json"
    guidance = float(read_json(hints)["guidance_scale"]) if hints.is_file() else 7.5
    found = BasePipeline(folder, Base(source, _digest(folder)), guidance, pipeline_class)
    kind_of_config(found.denoiser_config())
    return found


def check_no_code(folder: Path) -> None:
    """Raises InputError where a configuration of a pipeline asks for code to be run."""
    for config in (folder / "model_index.json", *sorted(folder.glob("*/config.json"))):
        asked = [key for key in _CODE_KEYS if key in read_json(config)]
        if asked:
            raise InputError(f"{config} asks for code to be run ({asked[0]}): refused")


def base_of(manifest: Manifest, given: str | None = None) -> BasePipeline:
    """The floating-point pipeline that an artifact was made from: where ``given`` says, or where it was.

    Raises:
        InputError: there is none. IntegrityError: it is another one, or was changed.
    """
    base = resolve_base(given or manifest.base.source)
    check_base(base, manifest)
    return base


def check_base(base: BasePipeline, manifest: Manifest) -> None:
    """Raises IntegrityError where an artifact was made from another pipeline."""
    if base.base.digest != manifest.base.digest:
        raise IntegrityError(
            f"{base.folder} is not the pipeline that this artifact was made from (its digest differs): pass --model"
        )


def load_pipeline(
    base: BasePipeline, dtype: torch.dtype | None = None, *, without: Collection[str] = ()
) -> DiffusionPipeline:
    """The stock diffusers pipeline on the CPU, float32 unless asked otherwise; safetensors only, no progress bar.

    Components in ``without`` are not read: None stands in their place.
    """
    import diffusers
    import torch

    kind = getattr(diffusers, base.pipeline_class)
    index = read_json(base.folder / "model_index.json")
    absent = {name: None for name, entry in index.items() if entry == [None, None]}  # such as SD3's third text encoder
    absent |= dict.fromkeys(without)
    try:
        pipe = kind.from_pretrained(
            base.folder, dtype=dtype or torch.float32, use_safetensors=True, local_files_only=True, **absent
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{base.base.source} cannot be loaded by diffusers: {' '.join(str(error).split())[:300]}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _locate(source: str) -> Path:
    if source == BUNDLED:
        return Path(str(resources.files("s2p_deploy") / "shapes" / "pipeline"))
    path = Path(source)
    if (path / "model_index.json").is_file():
        return path
    if path.exists():
        raise InputError(f"{source} is no diffusers pipeline: it has no model_index.json")
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise InputError(
            f"model {source!r} does not exist: give a folder in diffusers format, a hub id (owner/name), or {BUNDLED!r}"
        )
    return _download(source)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"model {hub_id!r} is neither a local folder nor reachable on the hub ({type(error).__name__})"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError where there is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON") from error
    if not isinstance(data, dict):
        raise InputError(f"{file} must hold a JSON object")
    return data


def _digest(folder: Path) -> str:
    """SHA-256 over the names and digests of the files that make the pipeline what it is."""
    parts = [
        folder / "model_index.json",
        folder / "sampling.json",
        *sorted(p for p in folder.glob("*/*") if p.suffix in _ALLOWED_SUFFIXES),
    ]
    lines = [f"{path.relative_to(folder).as_posix()} {file_digest(path)}" for path in parts if path.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
