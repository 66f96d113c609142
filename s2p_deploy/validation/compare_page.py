"""The comparison's page: one self-contained HTML file. Everything that came from outside is shown as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.validation import compare_figures
from s2p_deploy.validation.compare_table import NOTE, table_of
from s2p_deploy.validation.figures import svg
from s2p_deploy.validation.pictures import to_bytes
from s2p_deploy.validation.report_pictures import data_uri

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from s2p_deploy.records import Comparison
    from s2p_deploy.validation.compare_pictures import ReferencePictures

_SHOWN = 8


def render_page(comparison: Comparison, reference: ReferencePictures, pictures: Mapping[str, Path]) -> str:
    """The page of a comparison.

    Args:
        comparison: what was found.
        reference: the floating-point pictures of the first schedule.
        pictures: the folder of every recipe's pictures of that schedule (``00000.png``, ...), by the recipe's name.
    """
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("s2p_deploy.validation"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
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
    lines, bars = compare_figures.lines_height(comparison), compare_figures.bars_height(comparison)
    drawn = {
        "psnr": svg("psnr", compare_figures.psnr_bars(comparison), bars),
        "sqnr": svg("sqnr", compare_figures.sqnr_lines(comparison), lines),
    }
    for number, schedule in enumerate(comparison.floats):
        draw = compare_figures.error_lines(comparison, number)
        drawn[f"error, {schedule.label}"] = svg(f"error-{number}", draw, lines)
    return drawn


def _grid(comparison: Comparison, reference: ReferencePictures, pictures: Mapping[str, Path]) -> list[dict[str, Any]]:
    """A few prompts, evenly spread over the recipes' mean PSNR, worst first; every recipe's picture of each."""
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
    """The floating-point pictures of some prompts, one batch in memory at a time."""
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
