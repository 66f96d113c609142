"""benchmarks/full_size/engines.py on a small graph: its steps run, and each writes its own part of the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.full_size import engines as full_size
from benchmarks.pages.write import page, read_results
from tests.engines.small_graph import small_graph


def test_each_part_keeps_the_others(tmp_path: Path) -> None:
    out = tmp_path / "results" / "full_size_engines.json"
    full_size.note(out, "time", "bf16", {"steps": 1})
    full_size.note(out, "rtx", "fp", {"build_s": 2})
    full_size.note(out, "time", "f32", {"steps": 3})
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["time"] == {"bf16": {"steps": 1}, "f32": {"steps": 3}}
    assert found["rtx"] == {"fp": {"build_s": 2}}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder whose graphs are small, with an IR in the place of NNCF's."""
    import openvino

    folder = tmp_path_factory.mktemp("full_size")
    for form in ("fp", "w8a8", "w8a8-text", "w8a8-unshifted"):
        small_graph(folder / f"graph-{form}-fp32")
    full_size.build_engines(folder, "f32")
    model = openvino.Core().read_model(folder / "graph-fp-fp32" / "denoiser.onnx")
    shapes = {port.get_any_name(): port.get_partial_shape() for port in model.inputs}
    model.reshape({name: [2, *list(shape)[1:]] if shape[0].is_dynamic else shape for name, shape in shapes.items()})
    (folder / "nncf").mkdir()
    openvino.save_model(model, folder / "nncf" / "denoiser.xml", compress_to_fp16=False)
    (folder / "nncf" / "about.json").write_text('{"nncf": "none", "model_type": "none"}', encoding="utf-8")
    return folder


@pytest.mark.slow
def test_contenders_take_turns_and_the_page_shows_them(work: Path, tmp_path: Path) -> None:
    found = full_size.time_engines(work, "f32", rounds=2, nncf="nncf")
    assert set(found["contenders"]) == {"ours", "text", "openvino", "fp", "onnxruntime", "nncf"}
    assert all(one["steps"] == 4 and one["best_s"] > 0 for one in found["contenders"].values())
    assert found["ours_over"]["openvino"]["best"] == pytest.approx(
        found["contenders"]["ours"]["best_s"] / found["contenders"]["openvino"]["best_s"]
    )
    full_size.note(tmp_path / "full_size_engines.json", "time", "f32", found)
    full_size.note(tmp_path / "full_size_engines.json", "layers", "f32", full_size.layer_times(work, "f32", "nncf"))
    made = page("measured/full-size.md", read_results(tmp_path))
    assert "NNCF static INT8" in made
    assert str(tmp_path) not in made


@pytest.mark.slow
def test_the_shift_is_timed_over_the_engine_without(work: Path) -> None:
    found = full_size.time_shift(work, "f32", rounds=2)
    with_shift, without = (found["contenders"][form]["best_s"] for form in ("w8a8", "w8a8-unshifted"))
    assert found["shift_over_without"]["best"] == pytest.approx(with_shift / without)
    assert found["shift_over_without"]["low"] <= found["shift_over_without"]["high"]
