"""The pages that benchmarks/pages/write.py makes of committed measurements and support tables."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.pages.write import DOCS, RESULTS, page, page_names, plain, read_results
from s2p_deploy.engines.support import read_table, shipped_folder

FULL_SIZE = "measured/full-size.md"
MACHINE = {"machine": {"processor": "A processor", "cores": 2, "versions": {"openvino": "2026.4.1", "torch": "2"}}}


@pytest.mark.parametrize("name", page_names())
def test_the_committed_page_is_what_the_script_makes(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == page(name, read_results(RESULTS))


def test_what_is_not_measured_says_so() -> None:
    assert page(FULL_SIZE, {}).count("Not measured yet.") == 10


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
    text = page(FULL_SIZE, {"full_size_engines": {"time": {"bf16": run}}})
    assert "| NNCF static INT8 | 2.00 s | 2.50 s | 0.900 | 0.910 (0.890 to 0.930) | ≤ 1.00 | 3.0 GB |" in text
    assert "A processor, 2 cores; openvino 2026.4.1." in text


def test_layers_of_either_side_are_shown_where_they_take_long() -> None:
    ours = {"Conv brgconv": {"ms": 20.4, "layers": 2}, "Pad ref": {"ms": 9.9, "layers": 1}}
    sides = {"ours": ours, "nncf": {"Norm ref": {"ms": 30.0, "layers": 1}}}
    text = page(FULL_SIZE, {"full_size_engines": {"layers": {"bf16": MACHINE | {"layers": sides}}}})
    assert "| `Norm ref` |  |  | 30 | 1 |\n| `Conv brgconv` | 20 | 2 |  |  |\n| all | 30 |  | 30 |  |" in text


def built(seconds: float, plan: float, memory: float = 2.0) -> dict[str, Any]:
    layer = {"op": "conv", "lowering": "rescale", "weight_storage_bits": 8, "activation_bits": 8, "compute": "unknown"}
    numbers = {"build_s": seconds, "processor_s": seconds, "peak_memory_gb": memory, "plan_mb": plan}
    return MACHINE | numbers | {"profile": {"minimum": 1, "maximum": 4}, "layers": [layer | {"layers": 98}]}


def test_builds_are_ratios_to_the_floating_point_one() -> None:
    builds = {"fp": built(10.0, 1700.0), "w4a8": built(25.0, 680.0)}
    families = {"sd3 w4a8": built(90.0, 800.0, 4.0), "sd3 fp": built(30.0, 1600.0, 8.0), "sd14 fp": built(30.0, 1.0)}
    text = page(FULL_SIZE, {"full_size_engines": {"rtx": builds}, "full_size_families": {"rtx": families}})
    assert "| W4A8 | 25 s | 2.50 | 25 s | 2.0 GB | 1.00 | 680 MB | 0.40 |" in text
    assert "| FP16 | conv | rescale | 8 | 8 | unknown | 98 |" in text
    assert "| SD3 medium | 90 s | 3.00 | 4.0 GB | 0.50 | 800 MB | 0.50 |" in text
    assert "| SD v1-4 | 30 s" not in text, "half a pair"


def test_a_step_is_shown_beside_openvino_by_itself() -> None:
    own, baseline = {"best_s": 1.2, "peak_memory_gb": 2.6}, {"best_s": 1.6, "peak_memory_gb": 5.7}
    ratio = {"best": 0.75, "median": 0.78, "low": 0.7, "high": 0.8}
    run = MACHINE | {"batch": 2, "latents": 64, "precision": "bf16"}
    steps = {
        "sd14 trained": run | {"engines": {"openvino": baseline, "w4a8": own}, "ratios": {"w4a8": ratio}},
        "sdxl 512": run | {"engines": {"w4a8": own}, "ratios": {}},
    }
    text = page(FULL_SIZE, {"full_size_families": {"step": steps}})
    rows = [line for line in text.splitlines() if "64×64" in line and line.startswith("|")]
    assert rows == [
        "| SD v1-4, W4A8 | 64×64 | 1.20 s | 1.60 s | 0.75 | 0.78 (0.70 to 0.80) | 2.6 GB | 5.7 GB |",
        "| SDXL 1.0, W4A8 | 64×64 | 1.20 s | not run |  |  | 2.6 GB |  |",
    ]


def test_a_size_is_taken_without_the_time_table() -> None:
    about = {"seconds": 30.0, "peak_memory_gb": 1.0, "time_table_gb": 0.1}
    export = {"sd14": {"w4a8-fp16": about | {"denoiser_gb": 0.5}, "fp-fp16": about | {"denoiser_gb": 1.7}}}
    text = page(FULL_SIZE, {"full_size_stream": {}, "full_size_export": export})
    assert "| SD v1-4 | Not measured yet. | 30 s, 1.00 GB | 90 s, 1.5 GB | 0.40 GB | 0.25 |" in text


def test_every_lowering_was_measured_on_both_backends_that_execute_here() -> None:
    rows = read_results(RESULTS)["lowering_overhead"]["rows"]
    found = {(row["backend"], row["lowering"]) for row in rows}
    assert found == {(b, low) for b in ("onnxruntime", "openvino") for low in ("static", "rescale", "runtime_q")}


def test_every_policy_was_measured_at_every_load() -> None:
    rows = read_results(RESULTS)["serving"]["rows"]
    found = {(row["load"], row["batching"]) for row in rows}
    assert found == {(load, policy) for load in ("low", "middle", "high") for policy in ("step", "request", "one")}


def test_every_shipped_table_has_its_section() -> None:
    text = (DOCS / "reference" / "support.md").read_text(encoding="utf-8")
    keys = [read_table(file).key for file in shipped_folder().glob("*.json")]
    assert keys
    assert [key for key in keys if f"## {key.backend} {key.version}\n" not in text] == []


def test_a_librarys_words_stay_text() -> None:
    assert plain("<b> *a* | [x](y)") == r"&lt;b&gt; \*a\* \| \[x\](y)"
