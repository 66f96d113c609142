from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from s2p_deploy.calib import calibrate
from s2p_deploy.context import Context
from s2p_deploy.engines import backend_by_name, build_engine
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.export import export_graph
from s2p_deploy.export.lora_targets import LoraRequest
from s2p_deploy.families import load_time_path
from s2p_deploy.families.lora import GivenLora
from s2p_deploy.pipeline import Schedule
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import PromptSet, ValidationReport
from s2p_deploy.validation import Chain, open_chain, validate
from tests.random_loras import in_peft, random_layers, write_lora
from tests.small_pipelines import tiny_base


@pytest.fixture(scope="module")
def report(chain: Chain, prompts: PromptSet, tmp_path_factory: pytest.TempPathFactory) -> ValidationReport:
    out = tmp_path_factory.mktemp("report") / "report"
    return validate(chain, prompts, out, schedules=(Schedule(4, "ddim"),), command="s2p-deploy validate ...")


def test_a_right_engine_passes(report: ValidationReport) -> None:
    assert report.verdict == "passed", [gate for gate in report.gates if gate.status != "passed"]
    assert {gate.status for gate in report.gates} == {"passed"}
    assert report.failed_gates == ()


def test_the_report_is_an_artifact_that_reads_back(report: ValidationReport, chain: Chain) -> None:
    assert ValidationReport.open(report.folder) == report
    assert report.manifest.kind == "ValidationReport"
    assert report.manifest.parents["engine"].digest == chain.engine.manifest.digest
    assert report.html_file.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert len(list((report.folder / "pictures").iterdir())) == 6


def test_every_number_has_its_n_and_its_chain(report: ValidationReport, chain: Chain) -> None:
    data = json.loads((report.folder / "report.json").read_text(encoding="utf-8"))
    assert data["pictures"]["median"]["psnr"]["n"] == 3
    assert data["pictures"]["accuracy"]["fp"]["n"] == 3
    assert data["engine_numbers"]["end_to_end"]["change"]["n"] == 16
    assert all(block["n"] == 16 for block in data["graph_numbers"]["blocks"])
    assert data["pictures"]["step_error"]["timestep"][0] == 801.0
    assert set(data["digests"]) == {"engine", "graph", "calib", "dataset", "base", "prompts"}
    assert data["digests"]["graph"] == chain.graph.manifest.digest
    assert data["versions"]["torch"]
    assert data["not_run"]["lpips"] == "no local weights given"


def test_another_schedule_is_reported_beside_it(report: ValidationReport) -> None:
    (other,) = report.data["other_schedules"]
    assert (other["scheduler"], other["steps"]) == ("ddim", 4)
    assert other["median"]["psnr"]["value"] > other["pixel_shift_median"]["psnr"]["value"]


def test_a_failed_gate_is_a_result_and_not_an_error(chain: Chain, prompts: PromptSet, tmp_path: Path) -> None:
    gates = chain.recipe.validation.gates.model_copy(update={"median_psnr": 99.9})
    validation = chain.recipe.validation.model_copy(update={"gates": gates})
    strict = replace(chain, recipe=chain.recipe.model_copy(update={"validation": validation}))
    report = validate(strict, prompts, tmp_path / "report", pictures=1)
    assert report.verdict == "failed"
    assert [gate.name for gate in report.failed_gates] == ["pictures, median PSNR"]
    assert report.data["pictures"]["n"] == 1


def test_an_engine_that_cannot_run_here_is_not_verified(chain: Chain, prompts: PromptSet, tmp_path: Path) -> None:
    if backend_by_name("tensorrt_rtx").capabilities().executes:
        pytest.skip("TensorRT-RTX runs on this machine")
    elsewhere = replace(chain, engine=replace(chain.engine, backend="tensorrt_rtx"))
    report = validate(elsewhere, prompts, tmp_path / "report", pictures=1)
    assert report.verdict == "not verified"
    open_gates = {gate.name for gate in report.gates if gate.status == "not measured"}
    assert "blocks of the engine, worst SQNR" in open_gates
    assert "pictures, median PSNR" in open_gates
    assert next(gate for gate in report.gates if gate.name.startswith("blocks of the graph")).status == "passed"
    assert report.data["pictures"]["skipped"]


def test_a_report_is_not_overwritten_unasked(chain: Chain, prompts: PromptSet, report: ValidationReport) -> None:
    with pytest.raises(InputError, match="--force"):
        validate(chain, prompts, report.folder)


def test_another_base_pipeline_is_refused(chain: Chain, tmp_path: Path) -> None:
    other = tiny_base(tmp_path / "pipeline")
    (other.folder / "sampling.json").write_text('{"guidance_scale": 9.0}', encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"give that one \(--model\)"):
        open_chain(chain.engine, model=str(other.folder))


def test_parents_that_are_gone_are_named(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--graph PATH"):
        open_chain(chain.engine, graph=tmp_path)
    with pytest.raises(InputError, match="--calib PATH"):
        open_chain(chain.engine, calib=tmp_path)


@pytest.mark.slow
def test_an_engine_of_the_input_form_validates_and_draws_fractional_schedules(
    chain: Chain, prompts: PromptSet, tmp_path: Path
) -> None:
    path = load_time_path(chain.base)
    graph = export_graph(chain.calibrated, tmp_path / "graph", time_table="input", time_path=path)
    opened = open_chain(build_engine(graph, tmp_path / "engine", backend="onnxruntime"), calib=chain.calibrated.folder)
    report = validate(opened, prompts, tmp_path / "report", schedules=(Schedule(4, "euler-karras"),))
    assert report.verdict == "passed", [gate for gate in report.gates if gate.status != "passed"]
    data = json.loads((report.folder / "report.json").read_text(encoding="utf-8"))
    own, karras = data["scale_origins"]
    assert (own["calibrated"], own["interpolated"], own["clamped"]) == (5, 0, 0)
    assert (karras["scheduler"], karras["steps"]) == ("euler-karras", 4)
    assert karras["interpolated"] >= 2
    assert data["other_schedules"][0]["median"]["psnr"]["value"] > 20


@pytest.mark.slow
def test_loras_act_in_the_pictures_of_both(chain: Chain, prompts: PromptSet, tmp_path: Path) -> None:
    """In floating point the engine's pictures are the pipeline's: with the LoRA, and other ones than without."""
    model = calibrate(chain.base, Recipe.load("fp", {"sampling": {"steps": 4}}), None, tmp_path / "calib")
    graph = export_graph(model, tmp_path / "graph", lora=LoraRequest(4))
    branched = open_chain(build_engine(graph, tmp_path / "engine", backend="onnxruntime"))
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    paths = {"unet": [f"{block}.to_v", f"{block}.to_out.0"], "text_encoder": ["encoder.layers.0.self_attn.out_proj"]}
    file = write_lora(tmp_path / "ink.safetensors", in_peft(random_layers(chain.base, paths)))
    given = (GivenLora(file, 3.0),)
    plain, changed = (
        validate(branched, prompts, tmp_path / str(number), pictures=2, loras=loras)
        for number, loras in enumerate(((), given))
    )
    for report in (plain, changed):
        assert min(report.data["pictures"]["values"]["psnr"]) > 60
    pictures = [sorted((report.folder / "pictures").iterdir()) for report in (plain, changed)]
    assert all(one.read_bytes() != other.read_bytes() for one, other in zip(*pictures, strict=True))
    assert set(changed.data["digests"]) - set(plain.data["digests"]) == {"LoRA ink.safetensors:3"}
    stages: set[str] = set()
    context = Context(progress=lambda stage, *_: stages.add(stage))
    with pytest.raises(InputError, match="export with --lora-rank"):
        validate(chain, prompts, tmp_path / "none", pictures=1, loras=given, context=context)
    other = write_lora(tmp_path / "more.safetensors", in_peft(random_layers(chain.base, paths)))
    with pytest.raises(InputError, match="ranks together, this engine takes 4"):
        validate(branched, prompts, tmp_path / "many", pictures=1, loras=(*given, GivenLora(other)), context=context)
    assert not any("pictures" in stage for stage in stages)
