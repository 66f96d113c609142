"""Writes the tables of docs/engines.md from what the full-size benchmarks measured.

    python benchmarks/engines_page.py [--results benchmarks/results] [--out docs/engines.md]

What stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is made anew; the rest of the page is left as it
is. A part that was not measured yet says so.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).resolve().parents[1]
NOT_MEASURED = "Not measured yet."
_CONTENDERS = {
    "ours": "W8A8, a scale per timestep",
    "text": "the same, text projections once per prompt",
    "nncf": "NNCF static INT8",
    "openvino": "OpenVINO by itself, floating point",
    "fp": "our engine of recipe `fp`",
    "onnxruntime": "ONNX Runtime FP32",
}
_BOUNDS = {"bf16": {"nncf": 1.0, "openvino": 0.7, "fp": 0.7, "onnxruntime": 0.35}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "engines.md")
    asked = parser.parse_args()
    page = asked.out.read_text(encoding="utf-8")
    asked.out.write_text(page_with(page, read_results(asked.results)), encoding="utf-8")


def read_results(folder: Path) -> dict[str, Any]:
    """The parts of the full-size benchmarks by name; those that are not there are left out."""
    engines = _read(folder / "full_size_engines.json")
    parts = {name: engines[name] for name in ("time", "layers", "rtx") if name in engines}
    apart = {"ptq": "full_size_ptq.json", "attention": "attention_forms.json"}
    return parts | {name: found for name, file in apart.items() if (found := _read(folder / file))}


def page_with(page: str, results: Mapping[str, Any], sections: Mapping[str, Callable[[Any], str]] | None = None) -> str:
    """The page with every section made anew, by the function of its name (None: those of docs/engines.md).

    Raises:
        SystemExit: the page has a section of an unknown name, or one without an end.
    """
    known = _SECTIONS if sections is None else sections
    for name in re.findall(r"<!-- begin (.+?) -->", page):
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, _, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if name not in known or not closed:
            raise SystemExit(f"the page has a section {name!r} that is unknown or has no {end}")
        text = known[name](results[name]) if name in results else NOT_MEASURED
        page = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    return page


def time_section(found: Mapping[str, Any]) -> str:
    """A table per hint: seconds per step and our ratio to every contender."""
    return "\n\n".join(_time_table(hint, run) for hint, run in sorted(found.items()))


def layers_section(found: Mapping[str, Any]) -> str:
    """A table per hint: milliseconds per kind of layer, ours and NNCF's."""
    return "\n\n".join(_layers_table(hint, run) for hint, run in sorted(found.items()))


def rtx_section(found: Mapping[str, Any]) -> str:
    """Builds as ratios to the floating-point one, and what sites are stored in."""
    if "fp" not in found:
        return NOT_MEASURED
    head = ["build", "time", "of fp16", "processor time", "peak memory", "of fp16", "plan", "of fp16"]
    forms = [name for name in ("fp", "w8a8", "w4a8") if name in found]
    rows = [_rtx_row(name, found[name], found["fp"]) for name in forms]
    sites = [_site_row(name, kind) for name in forms for kind in found[name]["sites"]]
    columns = ["build", "op", "lowering", "weight bits stored", "activation bits", "compute type", "sites"]
    profile = found["fp"]["profile"]
    about = (
        f"{machine_line(found['fp'])} Batch {profile['minimum']} to {profile['maximum']}, a row of scales per sample."
        " Bounds: time ≤ 4 ×, memory ≤ 1 ×, plan ≤ 0.56 × (W8A8) and ≤ 0.45 × (W4A8)."
    )
    return f"{about}\n\n{table_of(head, rows)}\n\n{table_of(columns, sites)}"


def attention_section(found: Mapping[str, Any]) -> str:
    """A row per form of one attention: best and median milliseconds at each number of tokens."""
    runs = found["runs"]
    head = ["form", *(f"{run['tokens']} tokens, best (median)" for run in runs)]
    rows = [
        [forms[0]["about"], *(f"{form['best_ms']:.1f} ms ({form['median_ms']:.1f})" for form in forms)]
        for forms in zip(*(run["forms"] for run in runs), strict=True)
    ]
    about = (
        f"Hint {found['hint']}, batch {found['batch']}, {runs[0]['heads']} heads of {runs[0]['width']}."
        f" {machine_line(found)}"
    )
    return f"{about}\n\n{table_of(head, rows)}"


def ptq_section(found: Mapping[str, Any]) -> str:
    """Time, memory and sizes of recipe ptq."""
    if "ptq" not in found:
        return NOT_MEASURED
    made = found["ptq"]
    rows = [
        ["calls of the denoiser walked", f"{made['prompts']} prompt, {made['steps']} steps"],
        ["time", f"{made['seconds']:.0f} s, {made['processor_seconds']:.0f} s of processor time"],
        ["threads", str(made["threads"])],
        ["peak memory", f"{made['peak_memory_gb']:.1f} GB"],
        ["UNet on disk", f"{made['unet_gb']:.2f} GB"],
        ["calibrated model on disk", f"{made['calibrated_model_gb']:.2f} GB"],
    ]
    return table_of(["recipe ptq", ""], rows)


def _time_table(hint: str, run: Mapping[str, Any]) -> str:
    nncf = run["nncf"]
    bounds = _BOUNDS.get(hint, {})
    rows = [_time_row(name, run, bounds.get(name)) for name in _CONTENDERS if name in run["contenders"]]
    about = (
        f"Hint {hint}, batch {run['batch']}. {machine_line(run)} NNCF {nncf['nncf']}, model type {nncf['model_type']}."
    )
    head = ["engine", "best step", "median", "ours/this, best", "ours/this, median", "bound", "peak memory"]
    return f"{about}\n\n{table_of(head, rows)}"


def _time_row(name: str, run: Mapping[str, Any], bound: float | None) -> list[str]:
    one, ratio = run["contenders"][name], run["ours_over"].get(name)
    best = f"{ratio['best']:.3f}" if ratio else ""
    median = f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else ""
    allowed = f"≤ {bound:.2f}" if bound is not None else ""
    memory = f"{one['peak_memory_gb']:.1f} GB"
    return [_CONTENDERS[name], f"{one['best_s']:.2f} s", f"{one['median_s']:.2f} s", best, median, allowed, memory]


def _layers_table(hint: str, run: Mapping[str, Any]) -> str:
    ours, theirs = run["layers"]["ours"], run["layers"]["nncf"]
    kinds = sorted({*ours, *theirs}, key=lambda kind: (-max(_ms(ours, kind), _ms(theirs, kind)), kind))
    shown = [kind for kind in kinds if max(_ms(ours, kind), _ms(theirs, kind)) >= 10]
    rows = [[f"`{kind}`", *_spent(ours, kind), *_spent(theirs, kind)] for kind in shown]
    total = [f"{sum(_ms(side, kind) for kind in side):.0f}" for side in (ours, theirs)]
    rows.append(["all", total[0], "", total[1], ""])
    about = f"Hint {hint}. {machine_line(run)} Milliseconds by OpenVINO's counters; kinds of at least 10 ms."
    return f"{about}\n\n{table_of(['layer and kernel', 'ours', 'layers', 'NNCF', 'layers'], rows)}"


def _ms(side: Mapping[str, Any], kind: str) -> float:
    return float(side[kind]["ms"]) if kind in side else 0.0


def _spent(side: Mapping[str, Any], kind: str) -> list[str]:
    return [f"{side[kind]['ms']:.0f}", str(side[kind]["layers"])] if kind in side else ["", ""]


def _rtx_row(name: str, one: Mapping[str, Any], fp: Mapping[str, Any]) -> list[str]:
    keys = ("build_s", "peak_memory_gb", "plan_mb")
    ratio = {key: f"{one[key] / fp[key]:.2f}" if one is not fp else "" for key in keys}
    return [
        "FP16" if name == "fp" else name.upper(),
        f"{one['build_s']:.0f} s",
        ratio["build_s"],
        f"{one['processor_s']:.0f} s",
        f"{one['peak_memory_gb']:.1f} GB",
        ratio["peak_memory_gb"],
        f"{one['plan_mb']:.0f} MB",
        ratio["plan_mb"],
    ]


def _site_row(name: str, kind: Mapping[str, Any]) -> list[str]:
    keys = ("op", "lowering", "weight_storage_bits", "activation_bits", "compute", "sites")
    return ["FP16" if name == "fp" else name.upper(), *(str(kind[key]) for key in keys)]


def machine_line(run: Mapping[str, Any]) -> str:
    """On what it was measured, and with which libraries."""
    machine = run["machine"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in _SHOWN if name in machine["versions"])
    return f"{machine['processor']}, {machine['cores']} core{'s' if machine['cores'] > 1 else ''}; {versions}."


def table_of(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _read(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return data


_SHOWN = ("openvino", "onnxruntime", "tensorrt-rtx")
_SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "time": time_section,
    "layers": layers_section,
    "attention": attention_section,
    "rtx": rtx_section,
    "ptq": ptq_section,
}

if __name__ == "__main__":
    main()
