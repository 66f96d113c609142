"""Writes docs/support.md, what every backend makes of every pattern, from the tables that ``doctor --probe`` wrote.

    s2p-deploy doctor --probe                                     # on a machine with the backends
    cp ~/.cache/s2p_deploy/support/*.json engines/support/
    python benchmarks/support_page.py [engines/support/*.json] --out docs/support.md

Without files, the tables that ship are taken.
"""

from __future__ import annotations

import argparse
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

from s2p_deploy.engines.probe.matrix import COLUMNS, EXECUTES_NOT, dtypes_of, matrix_rows, problems
from s2p_deploy.engines.support_tables import read_table, shipped_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from s2p_deploy.engines.support_tables import SupportTable

HEAD = """# What the backends take

Every way to quantize one product, built by every backend in the version named. `s2p-deploy doctor --probe` makes such
tables of what is installed; builds use them to choose lowerings and to decide which INT4 weights stay packed, and a
version without a table is probed before its first build. This page is written by `python benchmarks/support_page.py`.

With x the activation, s the scale of the sample's row (runtime data) and c a constant:

| lowering | form |
|---|---|
| rescale | x·(c/s) → Q(c) → DQ(c) → op → ·(s/c) → + bias; a scale per sample |
| runtime_q | Q(x, s) → DQ(c) → op → ·(s/c) → + bias; s = Gather(table, step) |
| runtime_q_input | the same, s an input of the graph |
| static | Q(x, c) → DQ(c) → op → + bias |
| q_runtime | Q(x, s) → DQ(c) → op → + bias |
| dq_runtime | Q(x, c) → DQ(s) → op → + bias |
| qdq_runtime | Q(x, s) → DQ(s) → op → + bias |
| float | x → op → + bias; with quantized weights: weight-only |

Conv is 64 → 64 channels, 3×3, on [batch, 64, 16, 16]; MatMul is [batch, 77, 256] by [256, 128]; batch is dynamic.
Weights are INT8 or INT4 per output channel, INT4 in blocks (MatMul 64, Conv 32 along the input channels), or floating
point.

`builds`, and behind it the type that the backend reports for the product, where it reports one; `fails`: an error, or
no end in time or memory; `crashes`: a signal killed the process; `wrong`: it builds, and what it computes on two rows
of scales is not the reference's. What a backend reports depends on the processor too.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="the tables that ship, where none is given")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.write_text(page(options.files or shipped_files()), encoding="utf-8")


def shipped_files() -> list[Path]:
    """The tables in the package."""
    return sorted(shipped_folder().glob("*.json"))


def page(files: list[Path]) -> str:
    """The whole page."""
    return "\n".join([HEAD, *(line for file in files for line in section(read_table(file)))])


def section(table: SupportTable) -> Iterator[str]:
    """One backend: a matrix per dtype, and why what does not build does not."""
    key = table.key
    done = "built, not run" if key.device == EXECUTES_NOT else f"built and run on {key.device}"
    yield f"## {key.backend} {key.version}\n"
    for dtype in dtypes_of(table):
        yield f"{dtype} graphs, hint `{table.hint}`, {done}, {key.platform}:\n"
        yield from (_line(row) for row in (COLUMNS, ("---",) * len(COLUMNS), *matrix_rows(table, dtype)))
        yield ""
        for problem in problems(table, dtype):
            yield f"- {problem.verdict}: {', '.join(problem.patterns)}: {_escaped(problem.detail)}"
        if problems(table, dtype):
            yield ""


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """A library's words that must not become Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", html.escape(text, quote=False))


if __name__ == "__main__":
    main()
