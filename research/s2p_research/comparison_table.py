"""A comparison as tables of text: the same for the terminal, the page and the documents."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from s2p_deploy.records import Number, Skipped
from s2p_research.comparison import FLOAT_BITS

if TYPE_CHECKING:
    from collections.abc import Callable

    from s2p_research.comparison import Comparison, FloatFigures, Gains, PictureFigures, RecipeFigures

Value = Number | Skipped | float | None


@dataclass(frozen=True)
class Column:
    """One column: its head, how to find a recipe's value for a schedule, digits, and which direction is better."""

    title: str
    value: Callable[[RecipeFigures, int], Value]
    digits: int
    better: Literal["higher", "lower", ""] = ""
    once: bool = False  # the same for all schedules
    paired: bool = False  # with another recipe; left out where no recipe has it


@dataclass(frozen=True)
class Cell:
    """A value in words, its interval, and whether no quantized recipe does better."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """``kind`` says what the row is about; ``note`` what is to be known about it."""

    name: str
    kind: Literal["yardstick", "float", "recipe", "failed"]
    cells: tuple[Cell, ...]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """All recipes on one schedule, under a yardstick and floating point."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def _of_pictures(find: Callable[[PictureFigures], Value]) -> Callable[[RecipeFigures, int], Value]:
    return lambda recipe, schedule: find(recipe.pictures[schedule])


def _gain(find: Callable[[Gains], Value]) -> Callable[[RecipeFigures, int], Value]:
    return lambda recipe, schedule: find(recipe.gains[schedule]) if recipe.gains else None


COLUMNS = (
    Column("W bits", lambda recipe, _: recipe.weight_bits, 2, once=True),
    Column("A bits", lambda recipe, _: recipe.activation_bits, 2, once=True),
    Column("MB", lambda recipe, _: recipe.size / 1e6, 2, "lower", once=True),
    Column("PSNR dB, median", _of_pictures(lambda found: found.psnr.median), 2, "higher"),
    Column("gain dB", _gain(lambda gains: gains.psnr), 2),
    Column("PSNR, mean", _of_pictures(lambda found: found.psnr.mean), 2, "higher"),
    Column("10th pct", _of_pictures(lambda found: found.psnr.tenth), 2, "higher"),
    Column("worst", _of_pictures(lambda found: found.psnr.worst), 2, "higher"),
    Column("SSIM", _of_pictures(lambda found: found.ssim.median), 4, "higher"),
    Column("gain, SSIM", _gain(lambda gains: gains.ssim), 5, paired=True),
    Column("HaarPSI", _of_pictures(lambda found: found.haarpsi.median), 4, "higher"),
    Column("gain, HaarPSI", _gain(lambda gains: gains.haarpsi), 5, paired=True),
    Column("FID-to-FP*", _of_pictures(lambda found: found.feature_distance), 3, "lower"),
    Column("change, FID*", _gain(lambda gains: gains.feature_distance), 3, paired=True),
    Column("attributes right", _of_pictures(lambda found: found.accuracy), 4, "higher"),
    Column("SQNR dB", lambda recipe, _: recipe.sqnr.mean, 2, "higher", once=True),
    Column("calibration s", lambda recipe, _: recipe.calibration_seconds, 0, once=True),
    Column("s per picture", _of_pictures(lambda found: found.seconds), 3),
)
SHORT = (
    "W bits",
    "A bits",
    "MB",
    "PSNR dB, median",
    "gain dB",
    "10th pct",
    "SSIM",
    "gain, SSIM",
    "HaarPSI",
    "gain, HaarPSI",
    "FID-to-FP*",
    "change, FID*",
    "attributes right",
    "SQNR dB",
)
NOTE = (
    "Bits are averages: of a weight, and of an element that a layer reads; what stays in floating point counts 16."
    " PSNR, SSIM and HaarPSI to the floating-point pictures: medians unless said otherwise, bootstrap 95 % intervals."
    " gain: median of every picture's figure (dB: PSNR) less the same picture's under the first recipe that quantizes;"
    " change: of the distance, over the same resamples of the pictures."
    " FID-to-FP*: Frechet distance in the features of the shapes classifier."
    " SQNR: of one call, teacher-forced on held-out latents, pooled per timestep, mean over the timesteps."
    " Drawn by the float32 simulation of the integer arithmetic in PyTorch."
)


def table_of(comparison: Comparison, schedule: int = 0, titles: tuple[str, ...] | None = None) -> Table:
    """Tabulates all recipes on one of the comparison's schedules.

    Args:
        comparison: the numbers.
        schedule: its number; the columns that no schedule changes are shown with the first.
        titles: the columns that are wanted (None: all).
    """
    columns = [
        column
        for column in COLUMNS
        if (titles is None or column.title in titles) and not (schedule > 0 and column.once)
    ]
    shown = [recipe for recipe in comparison.results if recipe.quantized]
    columns = [
        column
        for column in columns
        if not column.paired or any(column.value(recipe, schedule) is not None for recipe in shown)
    ]
    best = {column.title: _best(column, comparison, schedule) for column in columns}
    drawn = comparison.floats[schedule]
    rows = [_yardstick(columns, drawn, comparison.pictures), _float_row(columns, drawn, comparison)]
    results = {recipe.name: recipe for recipe in comparison.results}
    failures = {recipe.name: recipe for recipe in comparison.failed}
    for recipe in comparison.recipes:
        if recipe.name in failures:
            empty = tuple(Cell("–") for _ in columns)
            rows.append(Row(recipe.name, "failed", empty, f"failed: {failures[recipe.name].message}"))
            continue
        found = results[recipe.name]
        cells = tuple(_recipe_cell(column, found, schedule, best[column.title]) for column in columns)
        note = f"simulation only: {found.simulation_only}" if found.simulation_only else ""
        rows.append(Row(recipe.name, "recipe", cells, note))
    count = f"{comparison.pictures} held-out prompts"
    return Table(f"{drawn.label}, {count}", tuple(column.title for column in columns), tuple(rows))


def _yardstick(columns: list[Column], drawn: FloatFigures, n: int) -> Row:
    shift = drawn.pixel_shift
    known = {"PSNR dB, median": shift["psnr"], "SSIM": shift["ssim"], "HaarPSI": shift["haarpsi"]}
    cells = tuple(cell_of(known.get(column.title), column.digits) for column in columns)
    return Row("one-pixel shift of FP", "yardstick", cells, f"n = {n}")


def _float_row(columns: list[Column], drawn: FloatFigures, comparison: Comparison) -> Row:
    known: dict[str, Value] = {
        "W bits": FLOAT_BITS,
        "A bits": FLOAT_BITS,
        "MB": comparison.size / 1e6,
        "attributes right": drawn.accuracy,
        "s per picture": drawn.seconds,
    }
    cells = tuple(cell_of(known.get(column.title), column.digits) for column in columns)
    return Row("floating point", "float", cells, "the pipeline as it is")


def _recipe_cell(column: Column, recipe: RecipeFigures, schedule: int, best: float | None) -> Cell:
    value = column.value(recipe, schedule)
    cell = cell_of(value, column.digits)
    return replace(cell, best=recipe.quantized and best is not None and _plain(value) == best)


def _best(column: Column, comparison: Comparison, schedule: int) -> float | None:
    """Finds the best value among the recipes that quantize; None where there is nothing to choose."""
    found = [_plain(column.value(recipe, schedule)) for recipe in comparison.results if recipe.quantized]
    values = [value for value in found if value is not None]
    if not column.better or len(values) < 2 or len(set(values)) == 1:
        return None
    return max(values) if column.better == "higher" else min(values)


def _plain(value: Value) -> float | None:
    """Returns a value to compare by, where there is one."""
    number = value.value if isinstance(value, Number) else value
    return number if isinstance(number, float | int) and math.isfinite(number) else None


def cell_of(value: Value, digits: int) -> Cell:
    """Formats a value as text, its interval with a digit less; a dash for nothing, words for what is not a number."""
    if value is None:
        return Cell("–")
    if isinstance(value, Skipped):
        return Cell("–", value.reason)
    if not isinstance(value, Number):
        return Cell(_text(value, digits))
    if value.low is None or value.high is None:
        return Cell(_text(value.value, digits))
    low, high = (_text(limit, max(1, digits - 1)) for limit in (value.low, value.high))
    return Cell(_text(value.value, digits), f"{low} to {high}")


def _text(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "not a number"
