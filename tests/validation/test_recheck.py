"""A finished report is judged again; what the validation measured is all that is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records import PromptSet, ValidationReport, write_artifact
from s2p_deploy.records.artifacts import Manifest
from s2p_deploy.validation import Chain, gates_from, recheck, validate, write_rechecked
from s2p_deploy.validation.measurements import Measurements, to_json
from s2p_deploy.validation.recheck import saved_measurements


@pytest.fixture(scope="module")
def report(chain: Chain, prompts: PromptSet, tmp_path_factory: pytest.TempPathFactory) -> ValidationReport:
    return validate(chain, prompts, tmp_path_factory.mktemp("report") / "report", command="s2p-deploy validate E")


@pytest.fixture
def rewritten(report: ValidationReport, tmp_path: Path) -> Callable[[dict[str, str | None]], ValidationReport]:
    """The report with other texts in some of its files, or without them, its manifest right."""

    def rewrite(changed: dict[str, str | None]) -> ValidationReport:
        def fill(folder: Path) -> dict[str, object]:
            shutil.copytree(report.folder, folder, dirs_exist_ok=True)
            (folder / "manifest.json").unlink()
            for name, text in changed.items():
                (folder / name).unlink()
                if text is not None:
                    (folder / name).write_text(text, encoding="utf-8")
            return report.manifest.content

        old: Manifest = report.manifest
        write_artifact(tmp_path / "other", kind=old.kind, base=old.base, recipe=old.recipe, fill=fill)
        return ValidationReport.open(tmp_path / "other")

    return rewrite


def test_the_same_gates_say_the_same(report: ValidationReport) -> None:
    found = recheck(report, gates_from(report, None, {}))
    assert found.gates == report.gates
    assert found.verdict == report.verdict == "passed"


def test_another_limit_flips_the_verdict_and_nothing_is_written(report: ValidationReport) -> None:
    before = {path: path.stat().st_mtime_ns for path in report.folder.rglob("*")}
    gates = gates_from(report, None, {"validation": {"gates": {"median_psnr": 99.9}}})
    found = recheck(report, gates)
    assert found.verdict == "failed"
    assert [gate.name for gate in found.gates if gate.status == "failed"] == ["pictures, median PSNR"]
    assert {path: path.stat().st_mtime_ns for path in report.folder.rglob("*")} == before


def test_another_recipe_brings_its_gates(report: ValidationReport, chain: Chain) -> None:
    gates = chain.recipe.validation.gates.model_copy(update={"median_psnr": 99.9})
    validation = chain.recipe.validation.model_copy(update={"gates": gates})
    other = chain.recipe.model_copy(update={"validation": validation})
    assert gates_from(report, other, {}).median_psnr == 99.9
    assert gates_from(report, other, {"validation": {"gates": {"median_psnr": 3.0}}}).median_psnr == 3.0
    assert recheck(report, gates).verdict == "failed"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"training": {"iterations": 3}}, "measures nothing"),
        ({"validation": {"pictures": 3}}, "measures nothing"),
        ({"validation": 3}, "measures nothing"),
        ({"validation": {"gates": 3}}, "name a gate"),
        ({"validation": {"gates": {"mediam_psnr": 3}}}, "mediam_psnr"),
        ({"validation": {"gates": {"median_psnr": "high"}}}, "median_psnr"),
    ],
)
def test_only_gates_can_change(report: ValidationReport, overrides: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        gates_from(report, None, overrides)


def test_a_new_report_differs_in_its_judgement_alone(report: ValidationReport, chain: Chain, tmp_path: Path) -> None:
    gates = gates_from(report, None, {"validation": {"gates": {"median_psnr": 99.9}}})
    again = write_rechecked(report, chain, gates, tmp_path / "again", command="s2p-deploy validate --recheck R")
    assert again.verdict == "failed"
    assert again.data["command"] == "s2p-deploy validate E; s2p-deploy validate --recheck R"
    changed = {key for key in report.data if report.data[key] != again.data[key]}
    assert changed == {"gates", "verdict", "command"}
    for name in report.manifest.files:
        same = (report.folder / name).read_bytes() == (again.folder / name).read_bytes()
        assert same == (name not in {"report.json", "report.html", "README.md"}), name
    assert set(again.manifest.files) == set(report.manifest.files)
    with pytest.raises(InputError, match="--force"):
        write_rechecked(report, chain, gates, tmp_path / "again")


def test_neither_the_report_nor_its_engine_is_replaced(report: ValidationReport, chain: Chain) -> None:
    gates = gates_from(report, None, {})
    for folder, words in ((report.folder, "is the report"), (chain.engine.folder / "report", "lies in the engine")):
        with pytest.raises(InputError, match=f"{words} that is read"):
            write_rechecked(report, chain, gates, folder, replace=True)
    assert ValidationReport.open(report.folder) == report


def test_what_is_kept_is_what_was_measured(report: ValidationReport) -> None:
    found = saved_measurements(report)
    assert isinstance(found, Measurements)
    assert to_json(Measurements, found) + "\n" == (report.folder / "measurements.json").read_text(encoding="utf-8")
    assert [floor.name for floor in found.floors] == ["FP pipeline in float16", "FP pipeline in bfloat16"]


def test_a_changed_file_is_refused(report: ValidationReport, tmp_path: Path) -> None:
    shutil.copytree(report.folder, tmp_path / "changed")
    file = tmp_path / "changed" / "measurements.json"
    opened = ValidationReport.open(tmp_path / "changed")
    file.write_text(file.read_text(encoding="utf-8").replace("1", "2", 1), encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"measurements\.json was changed"):
        recheck(opened, gates_from(report, None, {}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"record": "Measurements"}'])
def test_damaged_measurements_are_refused(
    rewritten: Callable[[dict[str, str | None]], ValidationReport], report: ValidationReport, text: str
) -> None:
    other = rewritten({"measurements.json": text})
    with pytest.raises(IntegrityError, match=r"measurements\.json"):
        recheck(other, gates_from(report, None, {}))


def test_a_report_that_kept_none_says_so(
    rewritten: Callable[[dict[str, str | None]], ValidationReport], report: ValidationReport
) -> None:
    other = rewritten({"measurements.json": None})
    with pytest.raises(InputError, match="validate again"):
        recheck(other, gates_from(report, None, {}))


def test_a_damaged_report_is_refused(
    rewritten: Callable[[dict[str, str | None]], ValidationReport], report: ValidationReport, chain: Chain
) -> None:
    data = json.loads((report.folder / "report.json").read_text(encoding="utf-8"))
    with pytest.raises(IntegrityError, match=r"report\.json is damaged: verdict"):
        rewritten({"report.json": json.dumps(data | {"verdict": "fine"})})
