"""docs/lowerings.md: what benchmarks/lowerings_page.py makes of the committed measurements, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.lowerings_page import page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "lowering_overhead.json").read_text(encoding="utf-8"))


def test_the_page_is_what_the_measurements_say() -> None:
    assert (ROOT / "docs" / "lowerings.md").read_text(encoding="utf-8") == page(RESULTS)


def test_every_lowering_was_measured_on_both_backends_that_execute_here() -> None:
    found = {(row["backend"], row["lowering"]) for row in RESULTS["rows"]}
    assert found == {(b, low) for b in ("onnxruntime", "openvino") for low in ("static", "rescale", "runtime_q")}
