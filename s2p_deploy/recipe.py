"""Recipes: what a run is asked to do, read from YAML, checked once, and stored resolved beside every artifact."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s2p_deploy.errors import InputError

FormatName = Literal["int8", "int4", "none"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rule(_Section):
    """One rule of the precision plan. Rules are read in order and the last that matches a site decides.

    ``match`` is a shell pattern over the site's module path (``conv_in``, ``*.attn2.to_k``) or ``text`` for every site
    that reads only the text. A pattern that matches no site is an error.
    """

    match: str
    weights: FormatName | None = None
    activations: FormatName | None = None


class Sampling(_Section):
    """The deployed sampling: the pipeline's scheduler, number of steps and guidance scale (null: the pipeline's)."""

    steps: int = Field(50, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=1.0)


class Dataset(_Section):
    """Algorithm 1: how many prompts, how many stored points of each trajectory, how many trajectories side by side."""

    prompts: int = Field(ge=1)
    points_per_prompt: int = Field(ge=1)
    width: int = Field(16, ge=1)
    prompts_per_shard: int = Field(32, ge=1)


class Training(_Section):
    """S2P training. ``iterations: 0`` keeps the closed-form starting scales.

    ``loss``: ``row_balanced`` divides each sample's error by its row's starting error, ``uniform`` is the paper's.
    Rates are AdamW's for the weights, and relative (per step, of log scale) for both kinds of scales.
    """

    iterations: int = Field(ge=0)
    batch: int = Field(32, ge=1)
    loss: Literal["row_balanced", "uniform"] = "row_balanced"
    weight_rate: float = Field(5e-5, ge=0)
    weight_scale_rate: float = Field(1e-4, ge=0)
    act_scale_rate: float = Field(1e-3, ge=0)
    empty_prompt_share: float = Field(0.5, ge=0, le=1)
    scale_latents: int = Field(64, ge=1)
    save_every: int = Field(100, ge=1)
    seed: int = 0


class Gates(_Section):
    """Limits that decide a validation, fixed before the run. Null switches a gate off.

    SQNR in dB. ``median_psnr`` is in dB over the pictures; ``beats_pixel_shift`` asks that it exceed what the FP
    pictures score against themselves shifted by one pixel. Accuracy drop is against the FP pictures' own.
    """

    site_code_mismatch_fp32: float = 0.001
    site_code_mismatch_fp16: float = 0.02
    site_code_max_lsb: int = 1
    block_sqnr: float = 50.0
    sqnr_to_fp_change_fp32: float = 0.2
    sqnr_to_fp_change_half: float = 0.3
    median_psnr: float | None = None
    beats_pixel_shift: bool = True
    attribute_accuracy_drop: float | None = 0.05


class Validation(_Section):
    """How much is compared: held-out pictures, and latents for the numeric questions."""

    pictures: int = Field(64, ge=1)
    latents: int = Field(64, ge=1)
    gates: Gates = Gates()


class Recipe(_Section):
    """A whole recipe, resolved."""

    name: str
    weights: FormatName
    activations: FormatName
    rules: tuple[Rule, ...] = ()
    sampling: Sampling = Sampling()
    dataset: Dataset
    training: Training
    validation: Validation = Validation()

    @property
    def is_float(self) -> bool:
        """Whether the recipe quantizes nothing (the baseline)."""
        return self.weights == "none" and self.activations == "none" and not self.rules

    def digest(self) -> str:
        """SHA-256 (hex) of the resolved recipe."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("s2p_deploy") / "recipes" / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """A preset by name, or a YAML file by path; ``overrides`` are merged in (nested dictionaries).

    Raises:
        InputError: there is no such recipe, it is not valid YAML, or a key or value is wrong (the message names it).
    """
    text, origin = _read(name_or_path)
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"recipe {origin} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(data, dict):
        raise InputError(f"recipe {origin} must be a mapping of keys")
    return recipe_from_data(_merge(data, overrides or {}), origin)


def recipe_from_data(data: dict[str, Any], origin: str) -> Recipe:
    """Checks parsed data. Raises InputError naming the first wrong key."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"recipe {origin}: {where}: {first['msg'].lower()}") from error


def _read(name_or_path: str) -> tuple[str, str]:
    if name_or_path in preset_names():
        preset = resources.files("s2p_deploy") / "recipes" / "presets" / f"{name_or_path}.yaml"
        return preset.read_text(encoding="utf-8"), name_or_path
    path = Path(name_or_path)
    if not path.is_file():
        raise InputError(
            f"unknown recipe {name_or_path!r}: use one of {', '.join(preset_names())}, or the path of a YAML file"
        )
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise InputError(f"recipe {path} is not UTF-8 text") from error


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
