"""docs/families.md: its full-size tables are what benchmarks/families_page.py makes of the committed measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines_page import NOT_MEASURED, page_with
from families_page import SECTIONS, builds_section, read_results, step_section, streaming_section

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "families.md"
MACHINE = {"machine": {"processor": "A processor", "cores": 2, "versions": {"openvino": "2026.4.1"}}}


def exported(size: float, table: float) -> dict[str, Any]:
    return {"seconds": 30.0, "peak_memory_gb": 1.0, "denoiser_gb": size, "time_table_gb": table}


def test_the_committed_page_is_what_the_script_makes() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page_with(text, read_results(ROOT / "benchmarks" / "results"), SECTIONS) == text


def test_a_size_is_taken_without_the_time_table() -> None:
    export = {"sd14": {"w4a8-fp16": exported(0.5, 0.1), "fp-fp16": exported(1.7, 0.1)}}
    table = streaming_section({"stream": {}, "export": export})
    assert "| 0.40 GB | 0.25 |" in table
    assert NOT_MEASURED in table


def test_a_step_is_told_beside_openvino_by_itself() -> None:
    own, rival = {"best_s": 1.2, "peak_memory_gb": 2.6}, {"best_s": 1.6, "peak_memory_gb": 5.7}
    ratio = {"best": 0.75, "median": 0.78, "low": 0.7, "high": 0.8}
    engines, ratios = {"openvino": rival, "w4a8": own}, {"w4a8": ratio}
    run = MACHINE | {"batch": 2, "latents": 64, "hint": "bf16", "engines": engines, "ratios": ratios}
    row = "| SD v1-4, W4A8 | 64×64 | 1.20 s | 1.60 s | 0.75 | 0.78 (0.70 to 0.80) | 2.6 GB | 5.7 GB |"
    table = step_section({"sd14 trained": run})
    assert row in table
    assert table.count("SD v1-4") == 1, "the rival is no row of its own"


def test_an_engine_whose_rival_was_not_run_has_no_ratio() -> None:
    own = {"best_s": 1.5, "peak_memory_gb": 6.2}
    run = MACHINE | {"batch": 2, "latents": 64, "hint": "bf16", "engines": {"w4a8": own}, "ratios": {}}
    assert "| SDXL 1.0, W4A8 | 64×64 | 1.50 s | not run |  |  | 6.2 GB |  |" in step_section({"sdxl 512": run})


def test_builds_are_told_beside_the_floating_point_one() -> None:
    made = MACHINE | {"processor_s": 90.0, "peak_memory_gb": 4.0, "plan_mb": 800.0}
    fp = MACHINE | {"processor_s": 30.0, "peak_memory_gb": 8.0, "plan_mb": 1600.0}
    table = builds_section({"sd3 w4a8": made, "sd3 fp": fp, "sd14 fp": fp})
    assert "| SD3 medium | 90 s | 3.00 | 4.0 GB | 0.50 | 800 MB | 0.50 |" in table
    assert "SD v1-4" not in table, "half a pair"
