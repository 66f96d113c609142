"""The stage: an engine and prompts give a ValidationReport. A failed gate is a result, not an error."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from s2p_deploy.calib.unfinished import claim_unfinished, partial_of
from s2p_deploy.progress import silent
from s2p_deploy.records.lock import claimed
from s2p_deploy.records.manifest import check_vacant
from s2p_deploy.validation.chain import Chain, open_chain
from s2p_deploy.validation.kept import Kept
from s2p_deploy.validation.measure import Asked, check_floor, measure
from s2p_deploy.validation.report_folder import Finished, write_report
from s2p_deploy.validation.report_numbers import bench_rows

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from s2p_deploy.pipeline import Schedule
    from s2p_deploy.progress import Progress
    from s2p_deploy.records import Engine, PromptSet, ValidationReport
    from s2p_deploy.validation.weights import MetricWeights

__all__ = ["Chain", "open_chain", "validate"]


def validate(  # noqa: PLR0913 - what, where, and options by keyword
    chain: Chain,
    prompts: PromptSet,
    out: Path,
    *,
    pictures: int | None = None,
    schedules: tuple[Schedule, ...] = (),
    floor: Engine | None = None,
    weights: MetricWeights | None = None,
    bench: Mapping[str, Any] | None = None,
    replace: bool = False,
    command: str = "",
    progress: Progress = silent,
) -> ValidationReport:
    """Asks the three questions of an engine and writes the report to ``out``.

    Finished parts stand in ``<out>.partial``: a second start of the same validation goes on there, to the same report
    but for wall times.

    Args:
        chain: the engine, from :func:`open_chain`.
        prompts: held-out prompts; the first ``pictures`` are drawn.
        out: folder of the report.
        pictures: how many pictures (None: the recipe's).
        schedules: other schedules to draw on the same engine, reported and not gated.
        floor: an engine of recipe ``fp`` of the same pipeline, reported beside the engine.
        weights: local weights of metrics that need some, from :func:`open_weights`.
        bench: what ``s2p-deploy bench --json`` printed of this engine, for the report.
        replace: whether a report at ``out``, or unfinished work of another validation, may be replaced.
        command: the command line, for the report.
        progress: told about every part.

    Returns:
        The report. Its verdict is ``failed`` where a gate was not met and ``not verified`` where one could not be
        measured here (an engine that needs another device).

    Raises:
        InputError: ``bench`` is of other engines, ``out`` exists, unfinished work of another validation does, another
            process is at work on it, or a schedule is not covered. MissingEnvironmentError: the engine cannot be
            loaded. IntegrityError: what was kept of an earlier start was changed.
    """
    check_vacant(out, replace=replace)
    if bench is not None:
        bench_rows(bench, chain.engine.manifest.digest)
    asked = Asked(prompts.first(pictures or chain.recipe.validation.pictures), schedules, floor, weights)
    if floor is not None:
        check_floor(floor, chain)
    partial = partial_of(out)
    with claimed(partial):
        claim_unfinished(partial, asked.request(chain), replace=replace)
        kept = Kept.begin(partial)
        found, drawings = measure(chain, asked, kept, progress)
        pairs = None if drawings is None else drawings.pairs
        digests = weights.digests if weights else {}
        finished = Finished(asked.prompts, found, pairs, digests, command, kept.spent, bench)
        report = write_report(chain, finished, chain.recipe.validation.gates, out, replace=replace)
        shutil.rmtree(partial)
    return report
