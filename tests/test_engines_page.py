"""docs/engines.md: what benchmarks/engines_page.py makes of the committed measurements, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines_page import NOT_MEASURED, page_with, read_results

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "engines.md"
MACHINE = {"machine": {"processor": "A processor", "cores": 2, "versions": {"openvino": "2026.4.1", "torch": "2"}}}


def place(name: str) -> str:
    return f"By hand.\n\n<!-- begin {name} -->\nold\n<!-- end {name} -->\n\nMore by hand.\n"


def built(seconds: float, plan: float) -> dict[str, Any]:
    site = {"op": "conv", "lowering": "rescale", "weight_storage_bits": 8, "activation_bits": 8, "compute": "unknown"}
    numbers = {"build_s": seconds, "processor_s": seconds, "peak_memory_gb": 2.0, "plan_mb": plan}
    return MACHINE | numbers | {"profile": {"minimum": 1, "maximum": 4}, "sites": [site | {"sites": 98}]}


def test_the_committed_page_is_what_the_script_makes() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page_with(text, read_results(ROOT / "benchmarks" / "results")) == text


def test_what_is_not_measured_says_so_and_the_rest_is_kept(tmp_path: Path) -> None:
    page = page_with(place("time"), read_results(tmp_path))
    assert page.startswith("By hand.\n\n<!-- begin time -->\n")
    assert page.endswith("<!-- end time -->\n\nMore by hand.\n")
    assert NOT_MEASURED in page
    assert "old" not in page


@pytest.mark.parametrize("page", [place("other"), place("time").replace("<!-- end time -->", "")])
def test_a_section_that_cannot_be_made_is_an_error(page: str) -> None:
    with pytest.raises(SystemExit, match=r"other|time"):
        page_with(page, {})


def test_steps_have_ratios_and_bounds() -> None:
    contender = {"best_s": 2.0, "median_s": 2.5, "peak_memory_gb": 3.0}
    names = ("ours", "nncf", "openvino", "onnxruntime")
    ratio = {"best": 0.9, "median": 0.91, "low": 0.89, "high": 0.93}
    run = MACHINE | {
        "batch": 2,
        "nncf": {"nncf": "3.4.0", "model_type": "transformer"},
        "contenders": dict.fromkeys(names, contender),
        "ours_over": dict.fromkeys(names[1:], ratio),
    }
    page = page_with(place("time"), {"time": {"bf16": run}})
    assert "| NNCF static INT8 | 2.00 s | 2.50 s | 0.900 | 0.910 (0.890 to 0.930) | ≤ 1.00 | 3.0 GB |" in page
    assert "A processor, 2 cores; openvino 2026.4.1." in page


def test_layers_of_either_side_are_shown() -> None:
    sides = {"ours": {"Conv brgconv": {"ms": 20.4, "layers": 2}}, "nncf": {"Norm ref": {"ms": 30.0, "layers": 1}}}
    page = page_with(place("layers"), {"layers": {"bf16": MACHINE | {"layers": sides}}})
    assert "| `Conv brgconv` | 20 | 2 |  |  |" in page
    assert "| `Norm ref` |  |  | 30 | 1 |" in page


def test_builds_are_ratios_to_the_floating_point_one() -> None:
    page = page_with(place("rtx"), {"rtx": {"fp": built(10.0, 1700.0), "w4a8": built(25.0, 680.0)}})
    assert "| W4A8 | 25 s | 2.50 | 25 s | 2.0 GB | 1.00 | 680 MB | 0.40 |" in page
    assert "| FP16 | conv | rescale | 8 | 8 | unknown | 98 |" in page
