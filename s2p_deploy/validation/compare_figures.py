"""Figures of a comparison. Each function gives what draws onto matplotlib's axes, for the page and for documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from s2p_deploy.records import Comparison, RecipeFigures

    Draw = Callable[[Any], None]
    DrawOf = Callable[[Comparison], Draw]

_COLORS = ("#2f7ed8", "#e07b28", "#3a9d5d", "#a04ac7", "#c0392b", "#17a2b8", "#8c6d46", "#d9579b", "#7f7f7f", "#a8a100")
_STYLES = ("-", "--", ":", "-.")
_YARDSTICK = "#c0392b"
_FLOOR = 1e-9  # a logarithmic axis shows no zero
_LONGEST = 40


def sqnr_lines(comparison: Comparison) -> Draw:
    """SQNR of one teacher-forced call on every row, a line per recipe."""
    results = _drawn(comparison)

    def draw(axes: Any) -> None:  # noqa: ANN401 - matplotlib's Axes, which is imported late
        for number, recipe in enumerate(results):
            axes.plot(recipe.sqnr.rows, recipe.sqnr.db, **_line(number, recipe.name))
        axes.set(xlabel="row (timestep; 0 is the picture)", ylabel="SQNR to FP, dB")
        _legend(axes, len(results))

    return draw


def error_lines(comparison: Comparison, schedule: int = 0) -> Draw:
    """Median relative error of the free-running latents after every call, a line per recipe."""
    results = _drawn(comparison)

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for number, recipe in enumerate(results):
            median = np.maximum(recipe.pictures[schedule].step_error.median, _FLOOR)
            axes.semilogy(np.arange(1, len(median) + 1), median, **_line(number, recipe.name))
        axes.set(xlabel="call of the denoiser", ylabel="latent error, relative to FP")
        _legend(axes, len(results))

    return draw


def psnr_bars(comparison: Comparison, schedule: int = 0) -> Draw:
    """Median PSNR of every recipe with its interval, and what a one-pixel shift scores."""
    found = [recipe.pictures[schedule].psnr.median for recipe in _drawn(comparison)]
    names = shown_names([recipe.name for recipe in _drawn(comparison)])
    shift = comparison.floats[schedule].pixel_shift["psnr"].value

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        values = [number.value for number in found]
        below = [0.0 if number.low is None else max(0.0, number.value - number.low) for number in found]
        above = [0.0 if number.high is None else max(0.0, number.high - number.value) for number in found]
        colors = [_COLORS[number % len(_COLORS)] for number in range(len(found))]
        places = np.arange(len(found))
        axes.barh(places, values, xerr=[below, above], color=colors, ecolor="#555555", capsize=2)
        axes.set_yticks(places, names)
        axes.axvline(shift, color=_YARDSTICK, linestyle="--", label="one-pixel shift of FP")
        axes.invert_yaxis()
        axes.set(xlabel="median PSNR to FP, dB")
        _legend(axes, 0)

    return draw


def bars_height(comparison: Comparison) -> float:
    """Inches that :func:`psnr_bars` needs."""
    return 1.0 + 0.27 * len(_drawn(comparison))


def lines_height(comparison: Comparison) -> float:
    """Inches that a figure of lines needs with its legend."""
    return 3.0 + 0.2 * (len(_drawn(comparison)) // _legend_columns(len(_drawn(comparison))))


def shown_names(names: Sequence[str]) -> list[str]:
    """Names that matplotlib takes as they are: no formulas, no control characters, none too long or hidden."""
    printable = ("".join(c if c.isprintable() else " " for c in name) for name in names)
    cut = (name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…" for name in printable)
    return [(" " + name if name.startswith("_") else name).replace("$", r"\$") for name in cut]


def _drawn(comparison: Comparison) -> tuple[RecipeFigures, ...]:
    """What is shown: a recipe that quantizes nothing would stretch every axis."""
    return tuple(recipe for recipe in comparison.results if recipe.quantized) or comparison.results


def _line(number: int, name: str) -> dict[str, Any]:
    return {
        "color": _COLORS[number % len(_COLORS)],
        "linestyle": _STYLES[number // len(_COLORS) % len(_STYLES)],
        "label": shown_names([name])[0],
        "linewidth": 1.3,
    }


def _legend(axes: Any, entries: int) -> None:  # noqa: ANN401 - as above
    """Above the axes, where it covers no line."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0, "handletextpad": 0.4}
    axes.legend(frameon=False, fontsize=8, ncols=_legend_columns(entries), **place)


def _legend_columns(entries: int) -> int:
    return 2 if entries > 3 else 3
