"""Writes the full-size tables of docs/families.md from what the benchmarks measured.

    python benchmarks/families_page.py [--results benchmarks/results] [--out docs/families.md]

What stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is made anew; see engines_page.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines_page import NOT_MEASURED, machine_line, page_with, table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "sd14": "SD v1-4",
    "sd21": "SD v2-1",
    "sdxl": "SDXL 1.0",
    "sdxl-half": "SDXL with 5 for 10 layers",
    "sd3": "SD3 medium",
}
FORM = "w4a8"
_FORMS = {
    "fp": ", floating point",
    "w8a8": ", W8A8",
    "w4a8": ", W4A8",
    "w4a8-text": ", W4A8, text projections once per prompt",
}
RIVAL = "openvino"
_EXPORT_BOUNDS = {"sd14": "90 s, 1.5 GB", "sdxl": "240 s, 2.0 GB", "sd3": "240 s, 2.0 GB"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "families.md")
    asked = parser.parse_args()
    page = asked.out.read_text(encoding="utf-8")
    asked.out.write_text(page_with(page, read_results(asked.results), SECTIONS), encoding="utf-8")


def read_results(folder: Path) -> dict[str, Any]:
    """The measurements that there are, by the name of their section."""
    stream, export, engines = (_read(folder / f"full_size_{name}.json") for name in ("stream", "export", "families"))
    streamed = {"stream": stream, "export": export} if stream and export else None
    parts = {
        "streaming": streamed,
        "step": engines.get("step"),
        "builds": engines.get("rtx"),
        "wide": engines.get("rtx-wide"),
    }
    return {name: part for name, part in parts.items() if part}


def streaming_section(found: Mapping[str, Any]) -> str:
    """Seconds and memory of calibration and export, and what the graph weighs beside its FP16 form."""
    calibrate = "calibrate (`ptq-stream`), processor time"
    head = ["W4A8", calibrate, "export in fp16", "bound", "denoiser", "of its FP16 graph"]
    return table_of(head, [_streaming_row(name, found) for name in NAMES if name in found["export"]])


def step_section(found: Mapping[str, Any]) -> str:
    """A row per engine: seconds per step beside what OpenVINO makes of the floating-point graph by itself."""
    head = ["", "latents", "best step", "OpenVINO", "ratio", "ratio of medians", "peak memory", "OpenVINO"]
    rows = [_step_row(key, form, run) for key, run in found.items() for form in _FORMS if form in run["engines"]]
    first = next(iter(found.values()))
    about = f"Hint {first['hint']}, batch {first['batch']}, fp16 graphs. {machine_line(first)} Bound: ≤ 0.75 ×."
    return f"{about}\n\n{table_of(head, rows)}"


def builds_section(found: Mapping[str, Any]) -> str:
    """A row per build: time, memory and size beside the FP16 build's."""
    pairs = {name: (found.get(f"{name} {FORM}"), found.get(f"{name} fp")) for name in NAMES}
    rows = [_build_row(name, made, fp) for name, (made, fp) in pairs.items() if made and fp]
    head = ["W4A8", "processor time", "of FP16's", "peak memory", "of FP16's", "plan", "of FP16's"]
    first = next(iter(found.values()))
    return f"{machine_line(first)}\n\n{table_of(head, rows)}"


def _streaming_row(name: str, found: Mapping[str, Any]) -> list[str]:
    made, fp = (found["export"][name][f"{form}-fp16"] for form in (FORM, "fp"))
    stream = found["stream"].get(name, {}).get(FORM)
    size, whole = (one["denoiser_gb"] - one["time_table_gb"] for one in (made, fp))
    return [
        NAMES[name],
        f"{stream['processor_seconds']:.0f} s, {stream['peak_memory_gb']:.2f} GB" if stream else NOT_MEASURED,
        f"{made['seconds']:.0f} s, {made['peak_memory_gb']:.2f} GB",
        _EXPORT_BOUNDS.get(name, ""),
        f"{size:.2f} GB",
        f"{size / whole:.2f}",
    ]


def _step_row(key: str, form: str, run: Mapping[str, Any]) -> list[str]:
    ours, rival, ratio = run["engines"][form], run["engines"].get(RIVAL), run["ratios"].get(form)
    return [
        NAMES[key.split(maxsplit=1)[0]] + _FORMS[form],
        f"{run['latents']}×{run['latents']}",
        f"{ours['best_s']:.2f} s",
        f"{rival['best_s']:.2f} s" if rival else "not run",
        f"{ratio['best']:.2f}" if ratio else "",
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "",
        f"{ours['peak_memory_gb']:.1f} GB",
        f"{rival['peak_memory_gb']:.1f} GB" if rival else "",
    ]


def _build_row(name: str, made: Mapping[str, Any], fp: Mapping[str, Any]) -> list[str]:
    cells = [NAMES[name]]
    for key, unit in (("processor_s", "s"), ("peak_memory_gb", "GB"), ("plan_mb", "MB")):
        digits = 1 if unit == "GB" else 0
        cells += [f"{made[key]:.{digits}f} {unit}", f"{made[key] / fp[key]:.2f}"]
    return cells


def _read(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return data


SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "streaming": streaming_section,
    "step": step_section,
    "builds": builds_section,
    "wide": builds_section,
}

if __name__ == "__main__":
    main()
