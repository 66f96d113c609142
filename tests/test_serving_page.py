"""docs/batching.md: what benchmarks/serving_page.py makes of the committed measurements, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.serving_page import page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_page_is_what_the_measurements_say() -> None:
    found = [
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("serving", "serving_clients")
    ]
    assert (ROOT / "docs" / "batching.md").read_text(encoding="utf-8") == page(*found)


def test_every_way_was_measured_at_every_load() -> None:
    rows = json.loads((RESULTS / "serving.json").read_text(encoding="utf-8"))["rows"]
    found = {(row["load"], row["batching"]) for row in rows}
    assert found == {(load, way) for load in ("low", "middle", "high") for way in ("step", "request", "one")}
