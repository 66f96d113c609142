"""The comparison's page: one self-contained HTML file. Everything that came from outside is shown as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.metrics import to_bytes
from s2p_deploy.validation.figures import shown_names, svg
from s2p_deploy.validation.report_page import data_uri
from s2p_research.comparison_table import NOTE, table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from s2p_research.comparison import Comparison, RecipeFigures
    from s2p_research.comparison_pictures import ReferencePictures

    Draw = Callable[[Any], None]

_COLORS = ("#2f7ed8", "#e07b28", "#3a9d5d", "#a04ac7", "#c0392b", "#17a2b8", "#8c6d46", "#d9579b", "#7f7f7f", "#a8a100")
_STYLES = ("-", "--", ":", "-.")
_YARDSTICK = "#c0392b"
_FLOOR = 1e-9  # a logarithmic axis shows no zero
_SHOWN = 8


def render_page(comparison: Comparison, reference: ReferencePictures, pictures: Mapping[str, Path]) -> str:
    """Renders the page of a comparison.

    Args:
        comparison: the numbers.
        reference: the floating-point pictures of the first schedule.
        pictures: the folder of every recipe's pictures of that schedule (``00000.png``, ...), by the recipe's name.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader
    from markupsafe import Markup

    loader = ChoiceLoader([PackageLoader("s2p_research"), PackageLoader("s2p_deploy.validation")])  # the report's style
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("compare.html.j2").render(
        data=comparison,
        note=NOTE,
        tables=[table_of(comparison, number) for number in range(len(comparison.floats))],
        figures={name: Markup(drawn) for name, drawn in _figures(comparison).items()},  # our own
        grid=_grid(comparison, reference, pictures),
    )


def _figures(comparison: Comparison) -> dict[str, str]:
    if not comparison.results:
        return {}
    lines, bars = lines_height(comparison), bars_height(comparison)
    drawn = {
        "psnr": svg("psnr", psnr_bars(comparison), bars),
        "sqnr": svg("sqnr", sqnr_lines(comparison), lines),
    }
    for number, schedule in enumerate(comparison.floats):
        draw = error_lines(comparison, number)
        drawn[f"error, {schedule.label}"] = svg(f"error-{number}", draw, lines)
    return drawn


def _grid(comparison: Comparison, reference: ReferencePictures, pictures: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Chooses a few prompts, evenly spread over the recipes' mean PSNR, worst first; every recipe's picture of each."""
    results = comparison.results
    if not results:
        return []
    psnr = np.array([recipe.pictures[0].psnr_values for recipe in results])
    order = np.argsort(psnr.mean(0), kind="stable")
    shown = order[np.linspace(0, len(order) - 1, min(_SHOWN, len(order))).round().astype(np.int64)]
    floats = _chosen(reference, shown)
    return [
        {
            "text": reference.task.prompts.prompts[index].text,
            "shots": [("FP", None, floats[index])]
            + [
                (recipe.name, psnr[number, index], data_uri(_read(pictures[recipe.name] / f"{index:05d}.png")))
                for number, recipe in enumerate(results)
            ],
        }
        for index in shown.tolist()
    ]


def _chosen(reference: ReferencePictures, indices: NDArray[np.int64]) -> dict[int, str]:
    """Reads the floating-point pictures of some prompts, one batch in memory at a time."""
    found: dict[int, str] = {}
    first = 0
    for part in reference.parts():
        for index in indices[(indices >= first) & (indices < first + len(part.pictures))].tolist():
            found[index] = data_uri(to_bytes(part.pictures[index - first : index - first + 1])[0])
        first += len(part.pictures)
    return found


def _read(file: Path) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(file) as opened:
        return np.asarray(opened.convert("RGB"))


def sqnr_lines(comparison: Comparison) -> Draw:
    """Draws SQNR of one teacher-forced call at every timestep, a line per recipe."""
    results = _drawn(comparison)

    def draw(axes: Any) -> None:  # noqa: ANN401 - matplotlib's Axes, which is imported late
        for number, recipe in enumerate(results):
            axes.plot(recipe.sqnr.timestep_indices, recipe.sqnr.db, **_line(number, recipe.name))
        axes.set(xlabel="timestep (0 is the picture)", ylabel="SQNR to FP, dB")
        _legend(axes, len(results))

    return draw


def error_lines(comparison: Comparison, schedule: int = 0) -> Draw:
    """Draws the median relative error of the free-running latents after every call, a line per recipe."""
    results = _drawn(comparison)

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for number, recipe in enumerate(results):
            median = np.maximum(recipe.pictures[schedule].step_error.median, _FLOOR)
            axes.semilogy(np.arange(1, len(median) + 1), median, **_line(number, recipe.name))
        axes.set(xlabel="call of the denoiser", ylabel="latent error, relative to FP")
        _legend(axes, len(results))

    return draw


def psnr_bars(comparison: Comparison, schedule: int = 0) -> Draw:
    """Draws the median PSNR of every recipe with its interval, and what a one-pixel shift scores."""
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
    """Computes the inches that :func:`psnr_bars` needs."""
    return 1.0 + 0.27 * len(_drawn(comparison))


def lines_height(comparison: Comparison) -> float:
    """Computes the inches that a figure of lines needs with its legend."""
    return 3.0 + 0.2 * (len(_drawn(comparison)) // _legend_columns(len(_drawn(comparison))))


def _drawn(comparison: Comparison) -> tuple[RecipeFigures, ...]:
    """Chooses what is shown: a recipe that quantizes nothing would stretch every axis."""
    return tuple(recipe for recipe in comparison.results if recipe.quantized) or comparison.results


def _line(number: int, name: str) -> dict[str, Any]:
    return {
        "color": _COLORS[number % len(_COLORS)],
        "linestyle": _STYLES[number // len(_COLORS) % len(_STYLES)],
        "label": shown_names([name])[0],
        "linewidth": 1.3,
    }


def _legend(axes: Any, entries: int) -> None:  # noqa: ANN401 - as above
    """Puts a legend above the axes, where it covers no line."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0, "handletextpad": 0.4}
    axes.legend(frameon=False, fontsize=8, ncols=_legend_columns(entries), **place)


def _legend_columns(entries: int) -> int:
    return 2 if entries > 3 else 3
