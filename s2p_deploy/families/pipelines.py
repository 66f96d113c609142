"""Stock diffusers pipelines of every family: found, checked, digested, loaded, saved, and their denoisers replaced."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families.assembled import is_assembled, pipeline_digest
from s2p_deploy.families.model_family import guidance_width, latent_channels, reads_mask
from s2p_deploy.families.network_files import (
    absent_components,
    check_components,
    check_finite,
    component_classes,
    read_config,
    read_denoiser_config,
    read_index,
    read_json,
    tokens_of,
)
from s2p_deploy.families.registry import family_of_config, network_config
from s2p_deploy.families.single_file import is_single_file
from s2p_deploy.families.sources import BUNDLED, find_pipeline
from s2p_deploy.families.text import encoded_widths
from s2p_deploy.records import Base, BaseOptions, file_digest
from s2p_deploy.records.files import check_room, claimed, writing

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch
    from diffusers import DiffusionPipeline, ModelMixin

    from s2p_deploy.families.model_family import Config, ModelFamily
    from s2p_deploy.records import Manifest

Task = Literal["text-to-image", "inpainting", "refining"]
# Stock pipelines whose denoiser an engine may replace; those besides text-to-image blend latents with a picture's.
PIPELINES = tuple(
    f"StableDiffusion{family}{task}Pipeline" for family in ("", "XL", "3") for task in ("", "Img2Img", "Inpaint")
)


@dataclass(frozen=True)
class _Parts:
    """Components of a pipeline that can be calibrated, by name; of ``optional`` either all are there or none."""

    denoiser: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


_SD = _Parts("unet", ("text_encoder", "tokenizer"))
_SDXL = _Parts("unet", ("text_encoder_2", "tokenizer_2"), optional=("text_encoder", "tokenizer"))
_SD3 = _Parts(
    "transformer",
    ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    optional=("text_encoder_3", "tokenizer_3"),
)
_INPAINTING = {
    "StableDiffusionInpaintPipeline": _SD,
    "StableDiffusionXLInpaintPipeline": _SDXL,
    "StableDiffusion3InpaintPipeline": _SD3,
}
_MOST_GUIDANCE = 1000
_REFINER = "StableDiffusionXLImg2ImgPipeline"
_BASES = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusion3Pipeline": _SD3,
    **_INPAINTING,
    _REFINER: _SDXL,
}
_DRAWN_BY = {"LatentConsistencyModelPipeline": "StableDiffusionPipeline"}  # the same pictures, with any scheduler
_REFINED = 0.3  # share of the schedule that a refiner runs, as its pipeline has it
_CODE_KEYS = ("custom_pipeline", "auto_map", "_attn_implementation_internal")


@dataclass(frozen=True)
class BasePipeline:
    """A floating-point diffusers pipeline on disk; ``default_guidance`` is the scale that it is meant to run with."""

    folder: Path
    base: Base
    default_guidance: float
    pipeline_class: str = "StableDiffusionPipeline"

    @property
    def task(self) -> Task:
        """Returns what the pipeline draws from besides a text."""
        return task_of(self.pipeline_class)

    @property
    def default_strength(self) -> float:
        """Returns the share of the schedule that the pipeline is meant to run: all of it, but of a refiner."""
        return _REFINED if self.task == "refining" else 1.0

    @property
    def denoiser_folder(self) -> Path:
        """Returns the folder of the denoiser's configuration and weights."""
        return self.folder / _BASES[self.pipeline_class].denoiser

    @property
    def place(self) -> str:
        """Returns where another process finds it: its hub id, or its folder by its whole path."""
        own = self.base.options == BaseOptions() and not Path(self.base.source).exists()
        return self.base.source if own else str(self.folder.resolve())

    @property
    def family(self) -> ModelFamily:
        """Returns the family of its denoiser."""
        return family_of_config(self.denoiser_config())

    def denoiser_config(self) -> Config:
        """Reads the denoiser's configuration as its pipeline has it.

        diffusers fills in what is absent, and pipelines change what old versions wrote: ``sample_size`` 32 to 64.

        Raises:
            InputError: it cannot be read, or is no such network's.
        """
        return dict(self._denoiser_config)

    @cached_property
    def _denoiser_config(self) -> Config:
        return read_denoiser_config(self.folder, self.pipeline_class, self.denoiser_folder.name)


def resolve_base(source: str, options: BaseOptions = BaseOptions()) -> BasePipeline:
    """Finds a pipeline: ``shapes`` (bundled), a folder, a single file, or a Hugging Face hub id, which is downloaded.

    Args:
        source: where it is.
        options: how it is read where its files leave that open.

    Raises:
        InputError: there is no such pipeline, it is no Stable Diffusion pipeline of diffusers, or its configuration
            asks for code to be run.
    """
    found = find_pipeline(source, options)
    folder = found.folder
    index = read_index(folder)
    if "_class_name" not in index:
        raise InputError(f"{folder / 'model_index.json'} names no class of pipeline: save the pipeline with diffusers")
    written = str(index["_class_name"])
    pipeline_class = _DRAWN_BY.get(written, written)
    if pipeline_class not in _BASES:
        known = ", ".join(sorted({*_BASES, *_DRAWN_BY}))
        raise InputError(f"{source} is a {pipeline_class}: supported pipelines are {known}")
    check_no_code(folder)
    guidance = _guidance(folder / "sampling.json")
    base = BasePipeline(folder, Base(source, found.digest, options, found.file), guidance, pipeline_class)
    _check_components_fit(base)
    return base


def _guidance(file: Path) -> float:
    """Reads the guidance scale that a pipeline is meant to run with; 7.5 where it does not say.

    Raises:
        InputError: the file says something else.
    """
    if not file.is_file():
        return 7.5
    guidance = read_json(file).get("guidance_scale")
    if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not 0 <= guidance <= _MOST_GUIDANCE:
        raise InputError(f"{file} has guidance_scale={guidance!r}: write a number from 0 up, or delete the file")
    return float(guidance)


def task_of(pipeline_class: str) -> Task:
    """Returns what pipelines of a class draw from besides a text."""
    if pipeline_class == _REFINER:
        return "refining"
    return "inpainting" if pipeline_class in _INPAINTING else "text-to-image"


def check_draws_from_text(pipeline_class: str) -> None:
    """Checks that pipelines of a class need nothing but a text.

    Raises:
        InputError: they inpaint or refine.
    """
    task = task_of(pipeline_class)
    if task != "text-to-image":
        needed = "a picture and a mask" if task == "inpainting" else "the picture to refine"
        raise InputError(
            f"a {pipeline_class} does not draw from text alone: give it {needed} (generate --image, /v1/images/edits)"
        )


def _check_components_fit(base: BasePipeline) -> None:
    """Checks from configurations that a pipeline has the components that it runs with, and that their widths fit.

    Raises:
        InputError: one is missing, or the denoiser reads other text or latents than the others write.
    """
    classes, parts = component_classes(base.folder), _BASES[base.pipeline_class]
    needed = ("vae", "scheduler", parts.denoiser, *parts.required)
    if any(name in classes for name in parts.optional):
        needed += parts.optional
    missing = [name for name in needed if name not in classes]
    if missing:
        raise InputError(f"{base.folder} has no {missing[0]}, which its {base.pipeline_class} needs: give a whole one")
    config, family = base.denoiser_config(), base.family
    configs = {name: read_config(base.folder / name, kind) for name, kind in classes.items() if name in needed}
    scaling = configs["vae"].get("scaling_factor")
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not scaling > 0:
        raise InputError(f"{base.folder / 'vae'}/config.json has scaling_factor={scaling!r}: write a number above 0")
    for name in ("tokenizer", "tokenizer_2"):
        encoder = configs.get(name.replace("tokenizer", "text_encoder"))
        if name not in needed or encoder is None:
            continue
        tokens, most = tokens_of(base.folder / name), encoder["max_position_embeddings"]
        if tokens > most:
            raise InputError(
                f"{base.folder / name} pads every text to {tokens} tokens, and its text encoder takes {most}:"
                " they are of two models"
            )
    scored = bool(read_index(base.folder).get("requires_aesthetics_score"))
    text, pooled = encoded_widths(base.pipeline_class, configs, family.text_width(config), scored=scored)
    for what, written, read in (
        ("channels of latents", configs["vae"]["latent_channels"], latent_channels(config)),
        ("numbers per token", text, family.text_width(config)),
        ("numbers of pooled text and sizes", pooled, family.added_width(config) - guidance_width(config)),
    ):
        if written != read:
            raise InputError(
                f"{base.denoiser_folder} reads {read} {what} by its config.json, and the pipeline's other components"
                f" give {written}: they are of two models"
            )
    if reads_mask(config) != (base.task == "inpainting"):
        reads = "a mask and a picture too" if reads_mask(config) else "latents alone"
        raise InputError(
            f"{base.denoiser_folder} reads {reads}, and a {base.pipeline_class} gives it something else: name the"
            f" {'Inpaint' if reads_mask(config) else 'text-to-image'} class in model_index.json"
        )


def check_no_code(folder: Path) -> None:
    """Checks that no configuration of a pipeline asks for code to be run.

    Raises:
        InputError: one does.
    """
    for config in (folder / "model_index.json", *sorted(folder.glob("*/config.json"))):
        keys = [key for key in _CODE_KEYS if key in read_json(config)]
        if keys:
            raise InputError(f"{config} asks for code to be run ({keys[0]}): refused")


def base_of(manifest: Manifest, given: str | None = None) -> BasePipeline:
    """Finds the floating-point pipeline that an artifact was made from: at ``given``, or where it was then.

    It is read with the options that it was calibrated with; the folder that was assembled by them, as it is.

    Raises:
        InputError: there is none.
        IntegrityError: it is another one, or was changed.
    """
    made, source = manifest.base, given or manifest.base.source
    single = is_single_file(source)
    if single and Path(source).is_file() and file_digest(Path(source)) != made.file:
        raise _another(source)
    fits = single == (made.file is not None) and not is_assembled(Path(source))
    base = resolve_base(source, made.options if fits else BaseOptions())
    check_base(base, manifest)
    return base


def check_base(base: BasePipeline, manifest: Manifest) -> None:
    """Checks that an artifact was made from this pipeline.

    Raises:
        IntegrityError: it was made from another.
    """
    if base.base.digest != manifest.base.digest:
        raise _another(base.base.source)


def _another(source: str) -> IntegrityError:
    return IntegrityError(
        f"{source} is not the pipeline that this artifact was made from (its digest differs): give that one (--model)"
    )


def load_pipeline(
    base: BasePipeline, dtype: torch.dtype | None = None, *, without: Collection[str] = ()
) -> DiffusionPipeline:
    """Loads the stock diffusers pipeline on the CPU, without a progress bar.

    Args:
        base: the pipeline on disk; only safetensors are read.
        dtype: of all its networks; None is float32.
        without: components that are not read; they are None in the pipeline.

    Raises:
        InputError: a component's files are not whole, or not those of its configuration; diffusers cannot load it.
    """
    return load_folder(base.folder, base.pipeline_class, dtype, without=without)


def load_folder(
    folder: Path, pipeline_class: str, dtype: torch.dtype | None = None, *, without: Collection[str] = ()
) -> DiffusionPipeline:
    """Loads a stock pipeline of any class from a folder: every one is loaded here. Arguments as :func:`load_pipeline`.

    Raises:
        InputError: as :func:`load_pipeline`.
    """
    import diffusers
    import torch

    absent = absent_components(read_index(folder)) | dict.fromkeys(without)
    check_components(folder, absent)
    try:
        pipe: DiffusionPipeline = getattr(diffusers, pipeline_class).from_pretrained(
            folder, dtype=dtype or torch.float32, use_safetensors=True, local_files_only=True, **absent
        )
    except Exception as error:  # what a component's file holds reaches any code of three libraries
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder} cannot be loaded by diffusers ({type(error).__name__}): {reason}") from error
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            check_finite(folder / name, part)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_pipeline(pipe: DiffusionPipeline, parent: Path) -> BasePipeline:
    """Saves a pipeline in memory as safetensors to ``pipeline-<digest>`` in ``parent``, once: the same one is reused.

    Raises:
        InputError: it is no pipeline of a supported class, has adapters that are not fused, or the disk has no room.
        IntegrityError: the saved one was changed.
    """
    written = type(pipe).__name__
    name = _DRAWN_BY.get(written, written)
    if name not in _BASES:
        raise InputError(
            f"a {name} is not supported: give a {' or '.join(sorted(_BASES))}, a folder in diffusers format,"
            f" a hub id, or {BUNDLED!r}"
        )
    modules = {part: module for part, module in pipe.components.items() if hasattr(module, "state_dict")}
    for part, module in modules.items():
        if getattr(module, "peft_config", None):
            raise InputError(f"the {part} of this pipeline has adapters (LoRA): fuse and unload them first")
        if any(parameter.is_meta for parameter in module.parameters()):
            raise InputError(f"the {part} of this pipeline is offloaded: load the pipeline without offloading")
    family_of_config(network_config(pipe.components[_BASES[name].denoiser]))
    size = sum(tensor.nbytes for module in modules.values() for tensor in module.state_dict().values())
    check_room(parent, size, "make room, or choose another folder")
    temporary = parent / ".pipeline.writing"
    with claimed(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with writing(temporary):
                pipe.save_pretrained(temporary, safe_serialization=True)
            digest = pipeline_digest(temporary)
            folder = parent / f"pipeline-{digest[:16]}"
            if not folder.exists():
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    saved = resolve_base(str(folder))
    if saved.base.digest != digest:
        raise IntegrityError(f"{folder} was changed since the pipeline was saved there: delete it")
    return saved


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """Returns the name of the denoiser among the pipeline's components."""
    return "transformer" if "transformer" in pipe.components else "unet"


def denoiser_of(pipe: DiffusionPipeline) -> ModelMixin:
    """Returns the pipeline's denoiser."""
    return pipe.components[denoiser_name(pipe)]


def with_denoiser(pipe: DiffusionPipeline, denoiser: torch.nn.Module) -> DiffusionPipeline:
    """Makes a pipeline of the same class with another denoiser and a fresh scheduler; it shares all else."""
    return with_components(pipe, {denoiser_name(pipe): denoiser})


def for_task(pipe: DiffusionPipeline, task: Literal["Img2Img", "Inpaint"]) -> DiffusionPipeline:
    """Makes the stock pipeline of a text-to-image one's family for another task; it shares all but the scheduler."""
    import diffusers

    kind = getattr(diffusers, type(pipe).__name__.removesuffix("Pipeline") + f"{task}Pipeline")
    taken = inspect.signature(kind.__init__).parameters
    given = pipe.components | {name: value for name, value in pipe.config.items() if name not in pipe.components}
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other: DiffusionPipeline = kind(**{n: v for n, v in given.items() if n in taken} | {"scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    return other


def with_components(pipe: DiffusionPipeline, others: Mapping[str, torch.nn.Module | None]) -> DiffusionPipeline:
    """Makes a pipeline of the same class with ``others`` and a fresh scheduler; it shares all else with ``pipe``."""
    # a scheduler has a state, so two pipelines may not share one
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    components = pipe.components | {"scheduler": scheduler} | others
    known = set(inspect.signature(type(pipe).__init__).parameters) & set(pipe.config) - set(components)
    result = type(pipe)(**components, **{name: pipe.config[name] for name in known})
    result.set_progress_bar_config(disable=True)
    return result
