"""Comparison: recipes side by side, everything that was measured of each, with the number of samples behind it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from s2p_deploy.errors import InputError
from s2p_deploy.records import Number, Skipped

if TYPE_CHECKING:
    from pathlib import Path

FLOAT_BITS = 16.0  # what stays in floating point is deployed in half precision
_DIGITS = 6

Record = TypeVar("Record", bound=BaseModel)


class _Record(BaseModel):
    # JSON has no word for what is not a number; as a string it stays readable, here and elsewhere
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Spread(_Record):
    """A picture metric over all pictures. ``worst`` has no interval: resampling says nothing about an extreme."""

    median: Number
    mean: Number
    tenth: Number
    worst: float


class StepErrors(_Record):
    """Relative error of the free-running latents after each call: the pictures' 10th percentile, median and 90th."""

    timesteps: tuple[float, ...]
    low: tuple[float, ...]
    median: tuple[float, ...]
    high: tuple[float, ...]


class PictureFigures(_Record):
    """One recipe's pictures on one schedule, against floating point.

    PSNR in dB; wall ``seconds`` per picture. ``feature_distance`` is the Frechet distance to the FP pictures in the
    features of the shapes classifier. ``*_values`` are of every single picture, in the prompts' order, and
    ``resampled_distances`` of the same resamples of the pictures for all recipes: with them gains are paired.
    """

    psnr: Spread
    ssim: Spread
    haarpsi: Spread
    feature_distance: Number | Skipped
    accuracy: Number | Skipped
    step_error: StepErrors
    seconds: float
    psnr_values: tuple[float, ...]
    ssim_values: tuple[float, ...] = ()
    haarpsi_values: tuple[float, ...] = ()
    resampled_distances: tuple[float, ...] = ()


class Gains(_Record):
    """How far one recipe's pictures are from another's on one schedule, its own less the other's.

    Medians of the differences of every picture's PSNR (dB), SSIM and HaarPSI, and the difference of the feature
    distances, which is a gain where it is below 0. None where the pictures' own values were not kept.
    """

    psnr: Number
    ssim: Number | None = None
    haarpsi: Number | None = None
    feature_distance: Number | None = None


class TimestepSqnr(_Record):
    """Teacher-forced SQNR in dB by timestep index, pooled over held-out prompts and both branches.

    ``mean`` is over the timesteps. Its ``n`` and its interval are over the prompts.
    """

    timestep_indices: tuple[int, ...]
    db: tuple[float, ...]
    mean: Number


class RecipeFigures(_Record):
    """Everything measured of one recipe; ``pictures`` in the order of the comparison's schedules.

    ``average_bits`` has weights and activations by the weightings of the CalibratedModel's manifest.
    ``size`` in bytes is computed: weights in their format's bits, everything else as the engines keep it.
    ``calibration_seconds`` is wall time, None where it was not watched. ``gains`` are over the first recipe that
    quantizes, per schedule.
    """

    name: str
    digest: str
    average_bits: dict[str, dict[Literal["weights", "activations"], float]]
    size: int
    simulation_only: str
    training: dict[str, Any]
    calibration_seconds: float | None
    sqnr: TimestepSqnr
    pictures: tuple[PictureFigures, ...]
    gains: tuple[Gains, ...] = ()

    @property
    def weight_bits(self) -> float:
        """Average bits of a weight."""
        return self.average_bits["parameters"]["weights"]

    @property
    def activation_bits(self) -> float:
        """Average bits of an element that a layer reads."""
        return self.average_bits["input_elements"]["activations"]

    @property
    def quantized(self) -> bool:
        """True where anything is quantized."""
        return min(self.weight_bits, self.activation_bits) < FLOAT_BITS


class FailedRecipe(_Record):
    """A recipe that came to no result, and the one line that says why."""

    name: str
    error: str
    message: str


class FloatFigures(_Record):
    """The floating-point pictures of one schedule, and what a shift by one pixel scores against them (medians).

    ``scheduler`` is None for the pipeline's own.
    """

    scheduler: str | None
    steps: int
    pixel_shift: dict[Literal["psnr", "ssim", "haarpsi"], Number]
    accuracy: Number | Skipped
    seconds: float

    @property
    def label(self) -> str:
        """Describes the schedule in words."""
        return f"{self.scheduler or 'own scheduler'}, {self.steps} steps"


class Comparison(_Record):
    """All recipes over the same held-out prompts, noise, schedules and guidance; ``floats`` has one entry per schedule.

    ``source`` names the pipeline and ``size`` is that of its denoiser in half precision, in bytes. ``pictures`` and
    ``latents`` are counts of held-out prompts.
    """

    kind: Literal["Comparison"] = "Comparison"
    schema_version: Literal[1] = 1
    source: str
    base: str
    size: int
    guidance_scale: float
    train: str
    held_out: str
    pictures: int
    latents: int
    floats: tuple[FloatFigures, ...]
    recipes: tuple[RecipeFigures | FailedRecipe, ...]
    command: str
    versions: dict[str, str]
    threads: int

    @property
    def results(self) -> tuple[RecipeFigures, ...]:
        """Lists the recipes that came to a result."""
        return tuple(recipe for recipe in self.recipes if isinstance(recipe, RecipeFigures))

    @property
    def failed(self) -> tuple[FailedRecipe, ...]:
        """Lists the recipes that came to none."""
        return tuple(recipe for recipe in self.recipes if isinstance(recipe, FailedRecipe))


def write_record(record: Comparison | RecipeFigures, path: Path) -> None:
    """Writes a record as JSON, numbers to six significant digits."""
    data = _rounded(json.loads(record.model_dump_json()))
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_comparison(path: Path) -> Comparison:
    """Reads ``comparison.json``. Raises InputError where it is not one."""
    return _read(path, Comparison)


def read_recipe_figures(path: Path) -> RecipeFigures:
    """Reads the JSON of one recipe's figures. Raises InputError where it is something else."""
    return _read(path, RecipeFigures)


def _read(path: Path, kind: type[Record]) -> Record:
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        first = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no {kind.__name__} of this version: {first}") from error


def _rounded(value: Any) -> Any:  # noqa: ANN401 - a walk over nested data
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value
