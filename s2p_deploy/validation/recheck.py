"""A finished report judged again with other gates: nothing is run, the measurements are those of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import InputError
from s2p_deploy.recipe import Recipe, recipe_from_data
from s2p_deploy.records import Prompt, PromptSet
from s2p_deploy.records.manifest import verify_files
from s2p_deploy.records.strict import Strict, checked
from s2p_deploy.records.validation_report import MEASUREMENTS, REPORT
from s2p_deploy.validation.exact_json import exact_value
from s2p_deploy.validation.gates import judge, verdict_of
from s2p_deploy.validation.kept import Spent
from s2p_deploy.validation.measurements import Measurements
from s2p_deploy.validation.numbers import Skipped
from s2p_deploy.validation.report_folder import PICTURES, Finished, write_report
from s2p_deploy.validation.report_pictures import read_pairs

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.recipe import Gates
    from s2p_deploy.records import GateResult, ValidationReport
    from s2p_deploy.records.validation_report import Verdict
    from s2p_deploy.validation.chain import Chain


@dataclass(frozen=True)
class Judgement:
    """What gates say of a report's measurements."""

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
    """The gates of ``recipe`` (None: those of the report's own), some of them changed.

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
    """All that the validation measured.

    Raises:
        InputError: the report is of a version that kept no measurements. IntegrityError: they were changed, or damaged.
    """
    if MEASUREMENTS not in report.manifest.files:
        raise InputError(f"{report.folder} has no {MEASUREMENTS}: an older version wrote it, validate again")
    kept = verify_files(report.folder, report.manifest, keep=(MEASUREMENTS,))
    found: Measurements = exact_value(Measurements, kept[MEASUREMENTS], report.folder / MEASUREMENTS)
    return found


def write_rechecked(
    report: ValidationReport, chain: Chain, gates: Gates, out: Path, *, replace: bool = False, command: str = ""
) -> ValidationReport:
    """Writes a whole report anew, judged by other gates; ``chain`` is the report's engine.

    Raises:
        InputError: ``out`` exists and ``replace`` is not set, or the report is of a version that kept no measurements.
        IntegrityError: the report was changed, or is damaged.
    """
    form = checked(_KeptForm, report.data, report.folder / REPORT)
    prompts = PromptSet(tuple(Prompt(one.id, one.text, one.negative) for one in form.prompts))
    found = saved_measurements(report)
    texts = [prompt.text for prompt in prompts.prompts]
    finished = Finished(
        prompts=prompts,
        found=found,
        pairs=None if isinstance(found.pictures, Skipped) else read_pairs(report.folder / PICTURES, texts),
        weights=form.weights,
        command="; ".join(filter(None, (form.command, command))),
        spent=Spent(form.spent.starts, form.spent.seconds),
        bench=form.bench,
    )
    return write_report(chain, finished, gates, out, replace=replace)


class _PromptForm(Strict):
    id: str
    text: str
    negative: str


class _SpentForm(Strict):
    starts: int
    seconds: float


class _KeptForm(Strict):
    """What of ``report.json`` a new report needs."""

    prompts: list[_PromptForm]
    weights: dict[str, str]
    command: str
    spent: _SpentForm
    bench: dict[str, Any] | None = None
