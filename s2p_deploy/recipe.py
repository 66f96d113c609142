"""Recipes: what a run does, read from YAML, checked once, and stored resolved beside every artifact."""

from __future__ import annotations

import hashlib
import json
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.resources.abc import Traversable

FormatName = Literal["int8", "int4", "none"]
MOST_GUIDANCE = 100.0  # far beyond it latents overflow, and pictures are black


class Section(BaseModel):
    """A part of a recipe: immutable, and of known keys only."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rule(Section):
    """One rule of the precision plan. Rules are read in order, and each that matches a layer overrides what it names.

    ``match`` is a shell pattern over the layer's module path (``mid_block.*``, ``*.attn2.to_k``), or ``input`` for the
    layer that reads the latents, ``output`` for the one that writes the prediction, ``text`` for every layer that reads
    only the text. A pattern that matches no layer is an error.
    """

    match: str
    weights: FormatName | None = None
    activations: FormatName | None = None


class Override(Section):
    """Formats that replace a layer's own; null keeps what the rules gave."""

    weights: FormatName | None = None
    activations: FormatName | None = None


class Mixed(Section):
    """Mixed precision by sensitivity (paper, section 4.3), decided after the rules.

    ``sensitivity``: ``none`` switches it off; ``fisher`` is the empirical Fisher score of random projections of the
    output, ``literal`` the paper's printed formula with the diffusion loss on FP-made latents, ``quantized`` the same
    formula with L_out at the starting quantized weights; these are measured on ``latents`` samples. ``pictures`` is the
    squared error of the pictures where one layer alone is quantized, in what the overrides change, over ``prompts``
    that follow the dataset's.
    ``top`` and ``bottom`` are the shares of layers (rounded) that become ``sensitive`` and ``insensitive``.
    ``products`` replaces ``top``: the layers with the largest score per multiplication become sensitive, up to that
    share of a call's multiplications.
    """

    sensitivity: Literal["none", "fisher", "literal", "quantized", "pictures"] = "none"
    latents: int = Field(256, ge=1)
    prompts: int = Field(16, ge=1)
    top: float = Field(0.05, ge=0, le=1)
    bottom: float = Field(0.05, ge=0, le=1)
    products: float | None = Field(None, gt=0, le=1)
    sensitive: Override = Override()
    insensitive: Override = Override()


class Transforms(Section):
    """Rewrites of the denoiser before it is planned, exact in floating point; off by default.

    ``split_shortcut``: convolutions over cat(h, skip) become two, each with its own scale: ``shortcut`` those on the
    shortcut path, which read it as it is, ``all`` also those behind a norm (Q-Diffusion, arXiv 2302.04304).
    ``shift: channel`` takes the middle of every input channel's range off before the grid: ``W (x - k) + W k``. In the
    bias of a norm that layers alone read (queries, keys and values, say), and in front of each other layer that reads
    a tensor of its own (convolutions behind SiLU, GEGLU products, shortcuts).
    """

    split_shortcut: Literal["none", "shortcut", "all"] = "none"
    shift: Literal["none", "channel"] = "none"


class Scales(Section):
    """Starting scales of weights and activations.

    ``calibrator``: ``own`` uses the other keys; ``modelopt`` and ``modelopt_smoothquant`` take nvidia-modelopt's INT8
    default and SmoothQuant configurations, which have one activation scale for all timesteps.
    ``weights``: per output channel, by least squares or the largest magnitude.
    ``activations``: measured on stored latents, the clip with the smallest squared error (``mse``) or the largest
    magnitude (``max``); or not measured, so that a model of any size is streamed through: ``given`` takes those of a
    calibrated model with the same activation quantizers (``calibrate --from``); ``default`` takes placeholders for unit
    normal activations, whose engines have realistic size and speed but draw no images.
    ``latents``: samples per timestep that decide its scale.
    """

    calibrator: Literal["own", "modelopt", "modelopt_smoothquant"] = "own"
    weights: Literal["least_squares", "max"] = "least_squares"
    activations: Literal["mse", "max", "default", "given"] = "mse"
    latents: int = Field(64, ge=1)

    @property
    def measured(self) -> bool:
        """Returns whether activations are measured, which takes a dataset and the denoiser's forward passes."""
        return self.activations in {"mse", "max"}


class Sampling(Section):
    """The deployed sampling: the pipeline's scheduler, number of steps and guidance scale (null: the pipeline's).

    Guidance up to 1 predicts with the prompt alone. ``max_sequence_length`` is how many tokens of SD3's third text
    encoder (or zeros in their place) follow the others'. A refiner runs the last ``strength`` of the schedule (null:
    0.3), and changes pictures of ``pictures``: a folder or hub id, its base model's; inpainting takes null, its own.
    """

    steps: int = Field(50, ge=1, le=1000)
    max_sequence_length: int = Field(256, ge=1, le=4096)
    guidance_scale: float | None = Field(None, ge=0, le=MOST_GUIDANCE)
    strength: float | None = Field(None, gt=0, le=1)
    pictures: str | None = None

    def guidance(self, default: float) -> float:
        """Returns the guidance scale, ``default`` where it is left open."""
        return default if self.guidance_scale is None else self.guidance_scale


class Dataset(Section):
    """Algorithm 1: how many prompts, how many samples of each trajectory, how many trajectories side by side.

    ``samples_per_prompt`` of at least the schedule's calls stores all (the paper's strategy a); 1 is strategy b.
    """

    prompts: int = Field(ge=1)
    samples_per_prompt: int = Field(ge=1)
    width: int = Field(16, ge=1)
    prompts_per_shard: int = Field(64, ge=1)


class Features(Section):
    """Loss on features, for which the teacher runs in the training loop.

    ``targets``: ``sensitive`` is the paper's L_sen over the plan's sensitive layers, ``blocks`` inter-layer
    distillation over the outputs of down, mid and up blocks (v2). ``relative`` divides a target's squared error by the
    teacher's square, so that large-valued blocks do not lead; raw means are the paper's.
    """

    targets: Literal["none", "sensitive", "blocks"] = "none"
    weight: float = Field(1.0, ge=0)
    relative: bool = True


class Freezing(Section):
    """Selective freezing (v2; two readings of it).

    ``oscillation``: every ``every`` iterations, weights whose codes flip back and forth more often than a threshold,
    which falls from ``start`` to ``end`` by a cosine, stay at their mean code from then on (arXiv 2203.11086).
    ``layers``: only the ``trained`` share of layers with the largest sensitivity trains its weights; scales all train.
    """

    what: Literal["none", "oscillation", "layers"] = "none"
    every: int = Field(500, ge=1)
    start: float = Field(0.04, ge=0, le=1)
    end: float = Field(0.01, ge=0, le=1)
    trained: float = Field(0.25, ge=0, le=1)


class Selection(Section):
    """Selection of the checkpoint to keep: the smallest error of free-running trajectories of held-out prompts.

    ``prompts`` of the prompt file that follow the dataset's are walked every ``every`` iterations; 0 keeps the last.
    """

    prompts: int = Field(0, ge=0)
    every: int = Field(100, ge=1)


class Training(Section):
    """S2P training. ``iterations: 0`` keeps the starting scales.

    ``loss`` weighs a sample's squared error: ``timestep_balanced`` by 1 over its timestep's starting error to the power
    ``balance``, ``uniform`` not at all (the paper). Rates are AdamW's for the weights, and relative (per step, of log
    scale) for both kinds of scales. ``adapter_rank`` trains low-rank updates W + BA in place of the weights
    (EfficientDM, arXiv 2310.03270). ``ema`` is the decay of the average that is kept in the end (0: the last values).
    ``accumulate`` batches make one update. ``checkpointing`` recomputes activations in the backward pass. Those of the
    three that a recipe does not state are chosen on a GPU, so that a training fits into its memory, and
    ``batch * accumulate`` stays. What a killed
    run goes on from is written every ``save_minutes`` and at the end; 0 writes it after every iteration.
    """

    iterations: int = Field(ge=0)
    batch: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1)
    loss: Literal["timestep_balanced", "uniform"] = "timestep_balanced"
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
    save_minutes: float = Field(5, ge=0)
    seed: int = 0


class Target(Section):
    """How close the pictures must come to the floating-point pipeline's; off where neither limit is given.

    The cheapest layers are left in floating point (their activations, and INT4 weights become INT8) until ``psnr`` (dB)
    and ``ssim`` are at least, ``lpips`` at most what is asked ``at`` the median, for nine pictures of ten (``p10``) or
    for the worst. Cheap is what adds little to a step's time, or with ``cost: layers`` what is one layer.
    ``ranked`` prompts say what each layer does to the pictures, ``searched`` how many layers it takes, with a margin
    for as many new prompts as a validation draws, and ``verified`` others whether it is so; they follow those of the
    dataset and of the selection.
    """

    psnr: float | None = Field(None, gt=0, lt=100)
    ssim: float | None = Field(None, gt=0, lt=1)
    lpips: float | None = Field(None, gt=0, lt=1)
    at: Literal["median", "p10", "worst"] = "median"
    cost: Literal["time", "layers"] = "time"
    ranked: int = Field(16, ge=1)
    searched: int = Field(64, ge=1)
    verified: int = Field(64, ge=1)

    @property
    def limits(self) -> dict[str, float]:
        """Returns the limits that are given, by the metric's name."""
        given = (("psnr", self.psnr), ("ssim", self.ssim), ("lpips", self.lpips))
        return {name: limit for name, limit in given if limit is not None}


class Gates(Section):
    """Limits that decide a validation, fixed before the run. Null switches a gate off.

    SQNR in dB. A part's own error must be ``block_margin`` or ``layer_margin`` under what quantization costs that part;
    where nothing in it is quantized, ``block_sqnr`` is asked, and half precision is never asked for more than
    ``block_sqnr_half``. Blocks of a float32 graph, whose arithmetic is the reference's own, have ``block_sqnr`` too.
    ``scale_difference`` and ``table_difference_*`` are relative. End to end, ``branch_margin`` is asked of the median
    latent of either CFG branch and ``latent_margin`` of every latent: how far the engine's own error is under
    quantization's, which may be below 0. ``guidance_sqnr`` is of the two branches' difference.
    ``median_psnr`` is in dB over the pictures, as ``p10_psnr`` (the 10th percentile) and ``worst_psnr`` are, and the
    three of SSIM and (at most) of LPIPS alike; a recipe's ``target`` sets its own. ``beats_pixel_shift`` asks that
    PSNR's median exceed what the FP pictures score against themselves shifted by one pixel. Accuracy drop is against
    the FP pictures' own.
    """

    layer_code_mismatch_fp32: float = 0.001
    layer_code_mismatch_fp16: float = 0.02
    layer_code_max_lsb: int = 1
    block_margin: float = 6.0
    layer_margin: float = 10.0
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
    p10_psnr: float | None = None
    worst_psnr: float | None = None
    median_ssim: float | None = None
    p10_ssim: float | None = None
    worst_ssim: float | None = None
    median_lpips: float | None = None
    p10_lpips: float | None = None
    worst_lpips: float | None = None
    beats_pixel_shift: bool = True
    attribute_accuracy_drop: float | None = 0.05


class Validation(Section):
    """How much is compared: held-out pictures, and latents for the numeric questions."""

    pictures: int = Field(64, ge=1)
    latents: int = Field(64, ge=1)
    gates: Gates = Gates()


class Bench(Section):
    """Limits that decide whether an engine is worth deploying, for ``s2p-deploy bench``. Null switches one off.

    ``speedup``: a step of the floating-point engine must take so many times as long, at the worse end of the interval.
    ``int8_share``: of the layers whose weights and activations are quantized, the share of which the backend must
    report that it computes them in INT8.
    """

    speedup: float | None = Field(None, gt=0)
    int8_share: float | None = Field(None, ge=0, le=1)


class Recipe(Section):
    """A whole recipe, resolved.

    Example:
        >>> recipe = Recipe.load("w8a8", {"dataset": {"prompts": 16}})
        >>> recipe.weights, recipe.dataset.prompts
        ('int8', 16)
    """

    name: str
    weights: FormatName
    activations: FormatName
    rules: tuple[Rule, ...] = ()
    mixed: Mixed = Mixed()
    transforms: Transforms = Transforms()
    scales: Scales = Scales()
    sampling: Sampling = Sampling()
    dataset: Dataset
    training: Training
    target: Target = Target()
    validation: Validation = Validation()
    bench: Bench = Bench()

    @staticmethod
    def load(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Reads a recipe that ships by name, or a YAML file by path; ``overrides`` are merged in (nested dictionaries).

        A recipe whose key ``extends`` names a preset starts from that one's values.

        Raises:
            InputError: there is no such recipe, it is not valid YAML, or a key or value is wrong.

        Example:
            >>> Recipe.load("w4a8", {"training": {"iterations": 20}}).training.iterations
            20
        """
        name = str(name_or_path)
        return recipe_from_data(recipe_data(name, shipped_recipes("s2p_deploy"), overrides), name)

    @property
    def is_float(self) -> bool:
        """Returns whether the recipe quantizes nothing (the baseline)."""
        return self.weights == "none" and self.activations == "none" and not self.rules

    def with_sampling(self, guidance_scale: float, strength: float) -> Self:
        """Returns the recipe with defaults for guidance scale and strength, where it leaves them open."""
        sampling = self.sampling
        given = {
            "guidance_scale": sampling.guidance(guidance_scale),
            "strength": strength if sampling.strength is None else sampling.strength,
        }
        return self.model_copy(update={"sampling": sampling.model_copy(update=given)})

    def with_target_gates(self) -> Self:
        """Returns the recipe with its target's limits among the gates of its validation."""
        limits = {f"{self.target.at}_{metric}": limit for metric, limit in self.target.limits.items()}
        gates = self.validation.gates.model_copy(update=limits)
        return self.model_copy(update={"validation": self.validation.model_copy(update={"gates": gates})})

    def with_division(self, batch: int, accumulate: int, *, checkpointing: bool) -> Self:
        """Returns the recipe with the samples of an update divided so; it states all three from then on."""
        division = {"batch": batch, "accumulate": accumulate, "checkpointing": checkpointing}
        return self.model_copy(update={"training": self.training.model_copy(update=division)})

    def with_seed(self, seed: int) -> Self:
        """Returns the recipe with another seed of training and sensitivity."""
        return self.model_copy(update={"training": self.training.model_copy(update={"seed": seed})})

    def digest(self) -> str:
        """SHA-256 (hex) of the resolved recipe."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def preset_names() -> list[str]:
    """Lists the recipes that ship with the package."""
    return sorted(shipped_recipes("s2p_deploy"))


def shipped_recipes(package: str) -> dict[str, Traversable]:
    """Finds the YAML files in a package's folder ``recipes``, by the recipe's name."""
    folder = resources.files(package) / "recipes"
    return {item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")}


def recipe_data(
    name_or_path: str, shipped: Mapping[str, Traversable], overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Reads the values of one of the ``shipped`` recipes, or of a YAML file, over those of the recipe it extends.

    Raises:
        InputError: as :meth:`Recipe.load`, but for its keys and values.
    """
    text = _read(name_or_path, shipped)
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"recipe {name_or_path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"recipe {name_or_path} must be a mapping of keys")
    parent = data.pop("extends", None)
    if parent is not None:
        if parent not in shipped or parent == data.get("name"):
            known = ", ".join(sorted(shipped))
            raise InputError(f"recipe {name_or_path}: extends: {parent!r} is no other recipe of {known}")
        data = _merge(recipe_data(parent, shipped), data)
    return _merge(data, dict(overrides or {}))


def recipe_from_data(data: dict[str, Any], origin: str) -> Recipe:
    """Checks parsed data. Raises InputError naming the first wrong key."""
    return checked_recipe(data, origin, Recipe)


def checked_recipe(data: dict[str, Any], origin: str, kind: type[AnyRecipe]) -> AnyRecipe:
    """Checks parsed data against a kind of recipe. Raises InputError naming the first wrong key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = _unknown_key(kind, first["loc"]) if first["type"] == "extra_forbidden" else first["msg"].lower()
        raise InputError(f"recipe {origin}: {where}: {reason}") from error


def _unknown_key(kind: type[BaseModel], path: tuple[int | str, ...]) -> str:
    """Explains that a recipe has no key at ``path``, with the keys of that section that are written alike."""
    section: Any = kind
    for part in path[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        section = None if field is None else field.annotation
    near = get_close_matches(str(path[-1]), getattr(section, "model_fields", {}), n=2, cutoff=0.5)
    return "there is no such key" + (f"; use {' or '.join(near)}" if near else "")


def _read(name_or_path: str, shipped: Mapping[str, Traversable]) -> str:
    if name_or_path in shipped:
        return shipped[name_or_path].read_text(encoding="utf-8")
    path = Path(name_or_path)
    if not path.is_file():
        known = ", ".join(sorted(shipped))
        raise InputError(f"unknown recipe {name_or_path!r}: use one of {known}, or the path of a YAML file")
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
