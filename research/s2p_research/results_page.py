"""Writes the tables and plots of research/results.md from the comparison.json files of ``compare``.

What ``reschedule.py``, ``yardsticks.py`` and ``late_calls.py`` measured becomes tables too.

    python -m s2p_research.results_page research/results/*.json --out research/results.md

A file NAME.json fills what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; where the page has no such
place, one is added at its end. Everything else in the page is left as it is. Plots go to images/NAME-*.svg beside it.
"""

from __future__ import annotations

import argparse
import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from s2p_research import comparison_page, late_calls, yardsticks
from s2p_research.comparison import read_comparison
from s2p_research.comparison_table import NOTE, SHORT, Cell, Row, table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from s2p_research.comparison import Comparison

_WITH_INTERVAL = {"PSNR dB, median", "gain dB", "gain, SSIM", "gain, HaarPSI", "change, FID*"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
}

_PLOTS = {
    "psnr": "median PSNR of every recipe",
    "sqnr": "SQNR of one call by timestep",
    "error": "error of the free-running latents after every call",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    comparisons, tables = read_comparisons(options.files), read_tables(options.files)
    before = options.out.read_text(encoding="utf-8") if options.out.exists() else "# Results\n"
    options.out.write_text(page_with(before, comparisons, tables), encoding="utf-8")
    for name, comparison in comparisons.items():
        write_plots(comparison, name, options.out.parent / "images")


def read_comparisons(files: Iterable[Path]) -> dict[str, Comparison]:
    """Reads the comparisons among JSON files, by the files' names; other benchmarks' files are left out."""
    return {file.stem: read_comparison(file) for file in files if _json(file).get("kind") == "Comparison"}


def read_tables(files: Iterable[Path]) -> dict[str, str]:
    """Tables of what ``reschedule.py``, ``yardsticks.py`` and ``late_calls.py`` wrote, by the files' names."""
    tables = {
        "Reschedule": reschedule_table,
        yardsticks.KIND: yardsticks.table_of,
        late_calls.KIND: late_calls.table_of,
    }
    found = {file.stem: _json(file) for file in files}
    return {name: tables[data["kind"]](data) for name, data in found.items() if data.get("kind") in tables}


def page_with(page: str, comparisons: Mapping[str, Comparison], tables: Mapping[str, str] | None = None) -> str:
    """Returns the page with the section of every comparison, and every table, made anew, by its name.

    Raises:
        SystemExit: the page has a section for which there is no comparison.
    """
    sections = {name: section(comparison, name) for name, comparison in comparisons.items()} | dict(tables or {})
    missing = set(re.findall(r"<!-- begin (.+?) -->", page)) - set(sections)
    if missing:
        raise SystemExit(f"the page has a section {sorted(missing)[0]!r} and no such file is given")
    for name, text in sections.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in page:
            page = f"{page.rstrip()}\n\n## {name}\n\n{begin}\n{end}\n"
        before, _, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not closed:
            raise SystemExit(f"section {name!r} of the page has no {end}")
        page = f"{before}{begin}\n{text}{end}{after}"
    return page


def reschedule_table(found: Mapping[str, Any]) -> str:
    """Writes a row per recipe: median PSNR of every schedule, as calibrated and after the short training."""
    cells: dict[str, dict[tuple[str, int, bool], str]] = {}
    for row in found["rows"]:
        value = f"{row['median_psnr']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
        cells.setdefault(row["recipe"], {})[row["scheduler"], row["steps"], row["fine_tuned"]] = value
    columns = sorted({key for of_recipe in cells.values() for key in of_recipe}, key=lambda key: (-key[1], key[2]))
    names = {True: "fine-tuned", False: "as calibrated"}
    shown = {"own": "PNDM", "unipc": "UniPC"}
    head = ["recipe", *(f"{shown[scheduler]} {steps}, {names[tuned]}" for scheduler, steps, tuned in columns)]
    rows = [[f"`{recipe}`", *(of_recipe[key] for key in columns)] for recipe, of_recipe in cells.items()]
    lines = [head, ["---"] * len(head), *rows]
    about = f"{found['pictures']} pictures, {found['iterations']} iterations."
    return f"\n{about}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def _json(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def section(comparison: Comparison, name: str) -> str:
    """Writes one comparison in Markdown: what was done, plots, a table per schedule."""
    about = (
        f"Pipeline {_escaped(comparison.source)}, {comparison.pictures} held-out prompts, equal noise, guidance"
        f" {comparison.guidance_scale:g}; SQNR over the trajectories of {comparison.latents} of them;"
        f" {comparison.threads} thread{'' if comparison.threads == 1 else 's'}, torch {comparison.versions['torch']},"
        f" diffusers {comparison.versions['diffusers']}. Bold: the best of the recipes that quantize. {NOTE}"
    )
    plots = "\n".join(f"![{title}](images/{name}-{kind}.svg)" for kind, title in _PLOTS.items())
    tables = [_table(comparison, number) for number in range(len(comparison.floats))]
    return "\n\n".join(["", about, plots, *tables, f"    {comparison.command}", ""])


def write_plots(comparison: Comparison, name: str, folder: Path) -> None:
    """Draws PSNR as bars, SQNR per timestep and the error of the free-running latents as lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = comparison_page.lines_height(comparison)
    _write(comparison_page.psnr_bars(comparison), comparison_page.bars_height(comparison), folder / f"{name}-psnr.svg")
    _write(comparison_page.sqnr_lines(comparison), lines, folder / f"{name}-sqnr.svg")
    _write(comparison_page.error_lines(comparison), lines, folder / f"{name}-error.svg")


def _table(comparison: Comparison, number: int) -> str:
    table = table_of(comparison, number, SHORT)
    head = ["recipe", *table.columns]
    lines = [_line(head), _line(["---"] * len(head)), *(_row(row, table.columns) for row in table.rows)]
    return f"{table.title[:1].upper()}{table.title[1:]}:\n\n" + "\n".join(lines)


def _row(row: Row, columns: tuple[str, ...]) -> str:
    name = _escaped(row.name) + (f" ({_escaped(row.note)})" if row.note and row.kind in {"recipe", "failed"} else "")
    pairs = zip(row.cells, columns, strict=True)
    return _line([name, *(_text(cell, title in _WITH_INTERVAL) for cell, title in pairs)])


def _text(cell: Cell, interval: bool) -> str:
    text = "" if cell.text == "–" else f"**{cell.text}**" if cell.best else cell.text
    return f"{text} ({cell.interval})" if interval and text and cell.interval else text


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Escapes foreign text that must not become Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _write(draw: Callable[[Any], None], height: float, file: Path) -> None:
    with mpl.rc_context(_STYLE | {"svg.hashsalt": file.stem}):
        figure = Figure(figsize=(7.0, height), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
