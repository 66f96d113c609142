"""A finished report judged again with other gates: nothing is run, the measurements are those of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import InputError
from s2p_deploy.recipe import Recipe, recipe_from_data
from s2p_deploy.records import Prompt, PromptSet, Skipped, check_vacant
from s2p_deploy.records.artifacts import verify_files
from s2p_deploy.records.typed_json import Strict, read_json
from s2p_deploy.records.validation_report import MEASUREMENTS, REPORT
from s2p_deploy.validation.checkpoint import Spent
from s2p_deploy.validation.gates import judge, verdict_of
from s2p_deploy.validation.measurements import Measurements, from_json
from s2p_deploy.validation.pictures import PicturePairs
from s2p_deploy.validation.report import KIND, PICTURES, Validated, write_report

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.recipe import Gates
    from s2p_deploy.records import GateResult, ValidationReport
    from s2p_deploy.records.validation_report import Verdict
    from s2p_deploy.validation.chain import Chain


@dataclass(frozen=True)
class Judgement:
    """The gates' results on a report's measurements."""

    gates: tuple[GateResult, ...]
    verdict: Verdict


def recheck(report: ValidationReport, gates: Gates) -> Judgement:
    """Judges a finished report by other gates; nothing is run and nothing written.

    Raises:
        InputError: the report is of a version that kept no measurements. IntegrityError: they were changed, or damaged.
    """
    results = judge(saved_measurements(report), gates)
    return Judgement(results, verdict_of(results))


def gates_from(report: ValidationReport, recipe: Recipe | None, overrides: dict[str, Any]) -> Gates:
    """Returns the gates of ``recipe`` (None: those of the report's own), some of them changed.

    Raises:
        InputError: ``overrides`` has other keys than ``validation.gates``, or one that no gate has.
    """
    validation = overrides.get("validation", {})
    if set(overrides) - {"validation"} or not isinstance(validation, dict) or set(validation) - {"gates"}:
        raise InputError("--recheck measures nothing: --set can change validation.gates.* only")
    given = recipe or recipe_from_data(report.manifest.recipe, str(report.folder))
    data = given.model_dump()
    changed = validation.get("gates", {})
    if not isinstance(changed, dict):
        raise InputError("--set validation.gates must name a gate, e.g. validation.gates.median_psnr=43")
    data["validation"]["gates"] |= changed
    return recipe_from_data(data, given.name).validation.gates


def saved_measurements(report: ValidationReport) -> Measurements:
    """Reads everything that the validation measured.

    Raises:
        InputError: the report is of a version that kept no measurements. IntegrityError: they were changed, or damaged.
    """
    if MEASUREMENTS not in report.manifest.files:
        raise InputError(f"{report.folder} has no {MEASUREMENTS}: an older version wrote it, validate again")
    kept = verify_files(report.folder, report.manifest, keep=(MEASUREMENTS,))
    measurements: Measurements = from_json(Measurements, kept[MEASUREMENTS], report.folder / MEASUREMENTS)
    return measurements


def write_rechecked(
    report: ValidationReport, chain: Chain, gates: Gates, out: Path, *, replace: bool = False, command: str = ""
) -> ValidationReport:
    """Writes a whole report anew, judged by other gates; ``chain`` is the report's engine.

    Raises:
        InputError: ``out`` may not be written, or the report is of a version that kept no measurements.
        IntegrityError: the report was changed, or is damaged.
    """
    check_vacant(out, KIND, replace=replace, inputs=chain.folders | {"report": report.folder})
    text = verify_files(report.folder, report.manifest, keep=(REPORT,))[REPORT]
    form = read_json(_KeptForm, text, report.folder / REPORT)
    measurements = saved_measurements(report)
    texts = [prompt.text for prompt in form.prompts]
    generated = not isinstance(measurements.pictures, Skipped)
    pairs = PicturePairs.read(report.folder / PICTURES, texts) if generated else None
    validated = Validated(
        prompts=PromptSet(form.prompts),
        measurements=measurements,
        pairs=pairs,
        weights=form.weights,
        command="; ".join(filter(None, (form.command, command))),
        spent=form.spent,
        bench=form.bench,
    )
    return write_report(chain, validated, gates, out, replace=replace)


class _KeptForm(Strict):
    """The parts of ``report.json`` that a new report needs."""

    prompts: tuple[Prompt, ...]
    weights: dict[str, str]
    command: str
    spent: Spent
    bench: dict[str, Any] | None = None
