"""benchmarks/full_size/families.py on small graphs: a form beside OpenVINO by itself, and the page that shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.full_size import families
from benchmarks.pages.write import page
from tests.engines.small_graph import small_graph


@pytest.mark.slow
def test_a_form_takes_turns_with_openvino_by_itself(tmp_path: Path) -> None:
    for form, weights in (("fp", "int8"), ("w4a8", "int4")):
        small_graph(tmp_path / f"graph-{form}-fp16", dtype="fp16", weights=weights)
    found = families.time_steps(tmp_path, ("w4a8",), None, 2, alone=False)
    ours, rival = found["engines"]["w4a8"], found["engines"]["openvino"]
    assert ours["steps"] == rival["steps"] == 4
    assert found["ratios"]["w4a8"]["best"] == pytest.approx(ours["best_s"] / rival["best_s"])
    assert "| SD v1-4, W4A8 | 8×8 |" in page(
        "measured/full-size.md", {"full_size_families": {"step": {"sd14 trained": found}}}
    )
    alone = families.time_steps(tmp_path, ("w4a8",), None, 1, alone=True)
    assert (set(alone["engines"]), alone["ratios"]) == ({"w4a8"}, {})
