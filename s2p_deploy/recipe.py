"""Recipes: what a run is asked to do, read from YAML, checked once, and stored resolved beside every artifact."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

FormatName = Literal["int8", "int4", "levels3", "levels5", "levels9", "none"]
ActFormatName = Literal["int8", "int4", "none"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rule(_Section):
    """One rule of the precision plan. Rules are read in order and the last that matches a site decides.

    ``match`` is a shell pattern over the site's module path (``mid_block.*``, ``*.attn2.to_k``), or ``input`` for the
    site that reads the latents, ``output`` for the one that writes the prediction, ``text`` for every site that reads
    only the text. A pattern that matches no site is an error.
    """

    match: str
    weights: FormatName | None = None
    activations: ActFormatName | None = None


class Override(_Section):
    """Formats that replace a site's own; null keeps what the rules gave."""

    weights: FormatName | None = None
    activations: ActFormatName | None = None


class Mixed(_Section):
    """Mixed precision by sensitivity (paper, section 4.3), decided after the rules.

    ``sensitivity``: ``none`` switches it off; ``probe`` is the empirical Fisher score of random probes of the output,
    ``literal`` the paper's printed formula with the diffusion loss on FP-made latents, ``quantized`` the same formula
    with L_out at the starting quantized weights. ``top`` and ``bottom`` are the shares of sites (rounded) that become
    ``sensitive`` and ``insensitive``; ``latents`` stored points are looked at.
    ``low_bit`` gives weights of the rules' INT4 sites BitsFusion's 3, 5 or 9 levels, as few as keep a site's own error
    under the threshold that makes the average ``low_bit`` bits (arXiv 2406.04333, section 3.3).
    """

    sensitivity: Literal["none", "probe", "literal", "quantized"] = "none"
    latents: int = Field(256, ge=1)
    top: float = Field(0.05, ge=0, le=1)
    bottom: float = Field(0.05, ge=0, le=1)
    sensitive: Override = Override()
    insensitive: Override = Override()
    low_bit: float | None = Field(None, gt=1.5, le=4)


class Transforms(_Section):
    """Rewrites of the denoiser before it is planned, exact in floating point; off by default.

    ``split_shortcut``: convolutions over cat(h, skip) become two, each with its own scale: ``shortcut`` those on the
    shortcut path, which read it as it is, ``all`` also those behind a norm (Q-Diffusion, arXiv 2302.04304).
    ``smoothing``: linear inputs divided per channel by max|X|^alpha / max|W|^(1-alpha) (SmoothQuant, arXiv 2211.10438).
    ``low_rank``: rank of a floating-point branch beside every linear (SVDQuant, arXiv 2411.05007). ``time_layers``:
    ``quantized`` makes the time table from time layers quantized like the rest, what a pipeline without precalculation
    would have.
    """

    split_shortcut: Literal["none", "shortcut", "all"] = "none"
    smoothing: float | None = Field(None, ge=0, le=1)
    low_rank: int = Field(0, ge=0)
    time_layers: Literal["exact", "quantized"] = "exact"


class Scales(_Section):
    """Where scales start.

    ``calibrator``: ``own`` uses the other keys; ``modelopt`` and ``modelopt_smoothquant`` take nvidia-modelopt's INT8
    default and SmoothQuant configurations, which have one activation scale for all timesteps.
    ``activations``: from stored latents, the clip with the smallest squared error (``mse``) or the peak (``max``); or
    without a look at any, so that a model of any size is streamed through: those of a calibrated model of the same act
    points (``given``, with ``calibrate --from``), or ``default`` ones as if every activation were unit normal, from
    which an engine gets its size and speed, and no pictures.
    ``timesteps``: one activation scale per row (``each``), or the rows' scales collapsed to one.
    ``latents``: stored points per row that decide its scale. ``zero_point``: asymmetric activations, simulation only.
    ``progressive``: a row's latents come from a walk whose earlier calls are quantized already, and the share
    ``relaxed`` of rows nearest the picture has 10-bit activations, in simulation only (PCR, arXiv 2311.06322).
    """

    calibrator: Literal["own", "modelopt", "modelopt_smoothquant"] = "own"
    weights: Literal["least_squares", "max"] = "least_squares"
    activations: Literal["mse", "max", "default", "given"] = "mse"
    timesteps: Literal["each", "max", "mean", "min"] = "each"
    latents: int = Field(64, ge=1)
    zero_point: bool = False
    progressive: bool = False
    relaxed: float = Field(0.0, ge=0, le=1)

    @property
    def measured(self) -> bool:
        """Whether activations are looked at, which takes a dataset and the denoiser's forward passes."""
        return self.activations in {"mse", "max"}


class Sampling(_Section):
    """The deployed sampling: the pipeline's scheduler, number of steps and guidance scale (null: the pipeline's).

    ``max_sequence_length`` is how many tokens of SD3's third text encoder (or zeros in their place) follow the others'.
    """

    steps: int = Field(50, ge=1, le=1000)
    max_sequence_length: int = Field(256, ge=1, le=4096)
    guidance_scale: float | None = Field(None, ge=1.0)


class Dataset(_Section):
    """Algorithm 1: how many prompts, how many stored points of each trajectory, how many trajectories side by side.

    ``points_per_prompt`` of at least the schedule's calls stores all of them (the paper's strategy a); 1 is strategy b.
    ``timesteps``: stored calls are drawn uniformly, or ``normal`` with mean 0.4 T and deviation 0.25 T towards the
    picture (PTQ4DM, arXiv 2211.15736).
    """

    prompts: int = Field(ge=1)
    points_per_prompt: int = Field(ge=1)
    timesteps: Literal["uniform", "normal"] = "uniform"
    width: int = Field(16, ge=1)
    prompts_per_shard: int = Field(64, ge=1)


class Features(_Section):
    """Loss on features, for which the teacher runs in the training loop.

    ``targets``: ``sensitive`` is the paper's L_sen over the plan's sensitive sites, ``blocks`` inter-layer distillation
    over the outputs of down, mid and up blocks (v2). ``relative`` divides a target's squared error by the teacher's
    square, so that large-valued blocks do not lead; raw means are the paper's.
    """

    targets: Literal["none", "sensitive", "blocks"] = "none"
    weight: float = Field(1.0, ge=0)
    relative: bool = True


class Freezing(_Section):
    """Selective freezing (v2; two readings of it).

    ``oscillation``: every ``every`` iterations, weights whose codes flip back and forth more often than a threshold,
    which falls from ``start`` to ``end`` by a cosine, stay at their mean code from then on (arXiv 2203.11086).
    ``layers``: only the ``trained`` share of sites with the largest sensitivity trains its weights; scales all train.
    """

    what: Literal["none", "oscillation", "layers"] = "none"
    every: int = Field(500, ge=1)
    start: float = Field(0.04, ge=0, le=1)
    end: float = Field(0.01, ge=0, le=1)
    trained: float = Field(0.25, ge=0, le=1)


class Selection(_Section):
    """Which checkpoint is kept: the one with the smallest error of free-running trajectories of held-out prompts.

    ``prompts`` of the prompt file that follow the dataset's are walked every ``every`` iterations; 0 keeps the last.
    """

    prompts: int = Field(0, ge=0)
    every: int = Field(100, ge=1)


class Training(_Section):
    """S2P training. ``iterations: 0`` keeps the starting scales.

    ``order``: ``mixed`` batches of all rows (S2P), or ``serial``: one row per iteration, from noise to picture, over
    and over. ``loss`` weighs a sample's squared error: ``row_balanced`` by 1 over its row's starting error to the power
    ``balance``, ``uniform`` not at all (the paper), ``sampler`` by how far an error of the row moves the last latents
    under the schedule, ``trajectory`` the same as measured through the network; ``guided`` is the row-balanced error of
    the guided output, both branches in the batch.
    Rates are AdamW's for the weights, and relative (per step, of log scale) for both kinds of scales.
    ``adapter_rank`` trains low-rank updates W + BA in place of the weights (EfficientDM, arXiv 2310.03270).
    ``ema`` is the decay of the average that is kept in the end (0: the last values). ``accumulate`` batches make one
    update. ``checkpointing`` recomputes activations in the backward pass.
    """

    iterations: int = Field(ge=0)
    batch: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1)
    order: Literal["mixed", "serial"] = "mixed"
    loss: Literal["row_balanced", "uniform", "sampler", "trajectory", "guided"] = "row_balanced"
    balance: float = Field(1.0, ge=0, le=1)
    features: Features = Features()
    freezing: Freezing = Freezing()
    selection: Selection = Selection()
    weight_rate: float = Field(5e-5, ge=0)
    weight_scale_rate: float = Field(1e-4, ge=0)
    act_scale_rate: float = Field(1e-3, ge=0)
    adapter_rank: int = Field(0, ge=0)
    ema: float = Field(0.0, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpointing: bool = False
    empty_prompt_share: float = Field(0.5, ge=0, le=1)
    save_every: int = Field(100, ge=1)
    seed: int = 0


class Gates(_Section):
    """Limits that decide a validation, fixed before the run. Null switches a gate off.

    SQNR in dB. A part's own error must be ``block_margin`` or ``site_margin`` under what quantization costs that part;
    where nothing in it is quantized, ``block_sqnr`` is asked, and half precision is never asked for more than
    ``block_sqnr_half``. Blocks of a float32 graph, whose arithmetic is the reference's own, have ``block_sqnr`` too.
    ``scale_difference`` and ``table_difference_*`` are relative. End to end, ``branch_margin`` is asked of the median
    latent of either CFG branch and ``latent_margin`` of every latent: how far the engine's own error is under
    quantization's, which may be below 0. ``guidance_sqnr`` is of the two branches' difference.
    ``median_psnr`` is in dB over the pictures; ``beats_pixel_shift`` asks that it exceed what the FP
    pictures score against themselves shifted by one pixel. Accuracy drop is against the FP pictures' own.
    """

    site_code_mismatch_fp32: float = 0.001
    site_code_mismatch_fp16: float = 0.02
    site_code_max_lsb: int = 1
    block_margin: float = 6.0
    site_margin: float = 10.0
    block_sqnr: float = 50.0
    block_sqnr_half: float = 40.0
    scale_difference: float = 1e-6
    table_difference_fp32: float = 1e-4
    table_difference_half: float = 2e-3
    sqnr_to_fp_change_fp32: float = 0.2
    sqnr_to_fp_change_half: float = 0.3
    branch_margin: float = -3.0
    latent_margin: float = -6.0
    guidance_sqnr: float = 3.0
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
    activations: ActFormatName
    rules: tuple[Rule, ...] = ()
    mixed: Mixed = Mixed()
    transforms: Transforms = Transforms()
    scales: Scales = Scales()
    sampling: Sampling = Sampling()
    dataset: Dataset
    training: Training
    validation: Validation = Validation()

    @property
    def is_float(self) -> bool:
        """Whether the recipe quantizes nothing (the baseline)."""
        return self.weights == "none" and self.activations == "none" and not self.rules

    @property
    def simulation_only(self) -> str:
        """What no engine can do, in words; empty where the recipe can be exported."""
        reasons = {
            "activations with zero points": self.scales.zero_point,
            "10-bit activations": self.scales.relaxed > 0,
        }
        return ", ".join(reason for reason, holds in reasons.items() if holds)

    def with_guidance(self, default: float) -> Recipe:
        """The recipe with ``default`` as its guidance scale, where it leaves that open."""
        if self.sampling.guidance_scale is not None:
            return self
        return self.model_copy(update={"sampling": self.sampling.model_copy(update={"guidance_scale": default})})

    def digest(self) -> str:
        """SHA-256 (hex) of the resolved recipe."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def preset_names() -> list[str]:
    """Names of the recipes that ship with the package: presets, rivals and ablations."""
    return sorted(item.name.removesuffix(".yaml") for item in _shipped())


def load_recipe(name_or_path: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """A preset by name, or a YAML file by path; ``overrides`` are merged in (nested dictionaries).

    A recipe whose key ``extends`` names a preset starts from that one's values.

    Raises:
        InputError: there is no such recipe, it is not valid YAML, or a key or value is wrong (the message names it).
    """
    return recipe_from_data(_merge(_load(name_or_path), overrides or {}), name_or_path)


def recipe_from_data(data: dict[str, Any], origin: str) -> Recipe:
    """Checks parsed data. Raises InputError naming the first wrong key."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"recipe {origin}: {where}: {first['msg'].lower()}") from error


def _shipped() -> list[Traversable]:
    recipes = resources.files("s2p_deploy") / "recipes"
    folders = [folder for folder in recipes.iterdir() if folder.is_dir()]
    return [item for folder in folders for item in folder.iterdir() if item.name.endswith(".yaml")]


def _load(name_or_path: str) -> dict[str, Any]:
    """A recipe's values, over those of the preset that it extends."""
    text = _read(name_or_path)
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"recipe {name_or_path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(data, dict):
        raise InputError(f"recipe {name_or_path} must be a mapping of keys")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if parent not in preset_names() or parent == data.get("name"):
        known = ", ".join(preset_names())
        raise InputError(f"recipe {name_or_path}: extends: {parent!r} is no other recipe of {known}")
    return _merge(_load(parent), data)


def _read(name_or_path: str) -> str:
    for item in _shipped():
        if item.name == f"{name_or_path}.yaml":
            return item.read_text(encoding="utf-8")
    path = Path(name_or_path)
    if not path.is_file():
        raise InputError(
            f"unknown recipe {name_or_path!r}: use one of {', '.join(preset_names())}, or the path of a YAML file"
        )
    try:
        return path.read_text(encoding="utf-8")
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
