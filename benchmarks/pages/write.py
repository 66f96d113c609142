"""Writes the pages of docs/ whose tables are measured: ``python -m benchmarks.pages.write``.

Every file under ``templates`` is a Jinja template of the page of that name under docs/. It reads the JSON files of
``benchmarks/results`` by their names (``results.serving``) and the support tables that ship (``support``).
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.pages.support import COLUMNS, dtypes_of, matrix_rows, problems
from s2p_deploy.engines.support import read_table, shipped_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
TEMPLATES = Path(__file__).with_name("templates")
LIBRARIES = ("openvino", "onnxruntime", "tensorrt-rtx")
SHOWN_MS = 10.0


def main() -> None:
    for name in page_names():
        file = DOCS / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page(name, read_results(RESULTS)), encoding="utf-8")
        print(file.relative_to(ROOT))


def page_names() -> list[str]:
    """The pages there are templates of, relative to docs/."""
    return sorted(file.relative_to(TEMPLATES).as_posix() for file in TEMPLATES.rglob("*.md"))


def read_results(folder: Path) -> dict[str, Any]:
    """The measurements of a folder, by the names of their files."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


def page(name: str, results: Mapping[str, Any]) -> str:
    """Renders one page. A section whose measurement is missing says so; a value that is missing is an error."""
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(
        loader=loader,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"fixed": fixed, "plain": plain, "machine": machine, "interval": interval}
    environment.globals |= {"layer_kinds": layer_kinds, "not_measured": "Not measured yet."}
    environment.globals |= {
        "columns": COLUMNS,
        "dtypes_of": dtypes_of,
        "matrix_rows": matrix_rows,
        "problems": problems,
    }
    tables = [read_table(file) for file in sorted(shipped_folder().glob("*.json"))]
    return environment.get_template(name).render(results=results, support=tables)


def fixed(value: float, digits: int = 0) -> str:
    """A number with so many digits behind the point."""
    return f"{value:.{digits}f}"


def interval(ratio: Mapping[str, float], digits: int = 2) -> str:
    """A median with its interval."""
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


def machine(run: Mapping[str, Any]) -> str:
    """The processor and the libraries that a run was measured with."""
    about = run["machine"]
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in LIBRARIES if name in about["versions"])
    return f"{about['processor']}, {about['cores']} core{'s' if about['cores'] > 1 else ''}; {versions}."


def plain(text: str) -> str:
    """A library's words, escaped so that they become neither Markdown nor HTML."""
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", html.escape(text, quote=False))


def layer_kinds(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Kinds of layers that take long enough on either side, the longest first."""

    def longest(kind: str) -> float:
        return max(float(side[kind]["ms"]) if kind in side else 0.0 for side in (ours, theirs))

    kinds = sorted({*ours, *theirs}, key=lambda kind: (-longest(kind), kind))
    return [kind for kind in kinds if longest(kind) >= SHOWN_MS]


if __name__ == "__main__":
    main()
