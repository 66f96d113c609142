"""``s2p-deploy validate --recheck``: a finished report judged by other gates; nothing is run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2p_deploy.cli.options import overrides_from_settings

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.records import ValidationReport
    from s2p_deploy.validation import Chain, Judgement


@dataclass(frozen=True)
class Moved:
    """Where an engine's parents are now, where they were moved, and the key that it must be signed with."""

    graph: Path | None
    calib: Path | None
    model: str | None
    public_key: Path | None

    def chain(self, engine: Path) -> Chain:
        """The engine and everything that it was made from."""
        from s2p_deploy.signing import open_engine

        opened = open_engine(engine, self.public_key)
        from s2p_deploy.validation import open_chain

        return open_chain(opened, graph=self.graph, calib=self.calib, model=self.model)


@dataclass(frozen=True)
class Recheck:
    """What ``--recheck`` was given: gates from a recipe and settings, and where a new report goes (None: nowhere)."""

    folder: Path
    recipe: str | None
    settings: list[str]
    out: Path | None
    force: bool

    def judged(self, engine: Path | None, moved: Moved) -> tuple[ValidationReport, Judgement]:
        """The report, or the new one, and what the gates say. ``engine`` is where the report's engine is now.

        Raises:
            InputError: there is no such report, recipe or gate. IntegrityError: the report is damaged.
        """
        from s2p_deploy.recipe import load_recipe
        from s2p_deploy.records import ValidationReport, parent_folder
        from s2p_deploy.validation import gates_from, recheck, write_rechecked

        report = ValidationReport.open(self.folder)
        recipe = load_recipe(self.recipe) if self.recipe else None
        gates = gates_from(report, recipe, overrides_from_settings(self.settings))
        judgement = recheck(report, gates)
        if self.out is None:
            return report, judgement
        chain = moved.chain(parent_folder(report.folder, report.manifest, "engine", engine))
        written = write_rechecked(report, chain, gates, self.out, replace=self.force, command=self._command())
        return written, judgement

    def _command(self) -> str:
        options = ["--recipe", self.recipe] if self.recipe else []
        options += [part for setting in self.settings for part in ("--set", setting)]
        return shlex.join(["s2p-deploy", "validate", "--recheck", str(self.folder), *options])
