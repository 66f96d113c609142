"""What a validation has finished so far, in its work folder: a second start goes on from there to the same report."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, get_type_hints

import numpy as np
import torch
from safetensors.numpy import load_file

from s2p_deploy.records.strict import reading_tensors
from s2p_deploy.records.whole_files import write_tensors, write_text
from s2p_deploy.validation.exact_json import exact_text, exact_value
from s2p_deploy.validation.measurements import Measurements
from s2p_deploy.validation.pictures import Drawing, draw_parts, joined_drawing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from s2p_deploy.pipeline import Schedule
    from s2p_deploy.progress import Progress
    from s2p_deploy.records import PromptSet

_CLOCK = "clock.json"
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Spent:
    """Wall ``seconds`` of a validation over all its ``starts``.

    Of a start that was killed, what came after its last finished part is neither kept nor counted.
    """

    starts: int
    seconds: float


@dataclass(frozen=True)
class Kept:
    """Finished parts in ``folder``; ``before`` is what earlier starts spent, ``began`` is this one's clock."""

    folder: Path
    before: Spent
    began: float

    @staticmethod
    def begin(folder: Path) -> Kept:
        """This start's, in a work folder that it holds."""
        clock = folder / _CLOCK
        before: Spent = exact_value(Spent, clock.read_bytes(), clock) if clock.exists() else Spent(0, 0.0)
        kept = Kept(folder, before, time.perf_counter())
        kept._tick()
        return kept

    @property
    def spent(self) -> Spent:
        """This start included, so far."""
        return Spent(self.before.starts + 1, self.before.seconds + time.perf_counter() - self.began)

    def found(self, name: str, make: Callable[[], _Found]) -> _Found:
        """The field ``name`` of :class:`Measurements`: as an earlier start kept it, or made and kept now.

        Raises:
            IntegrityError: what was kept was changed.
        """
        path, kind = self.folder / f"{name}.json", get_type_hints(Measurements)[name]
        if path.exists():
            kept: _Found = exact_value(kind, path.read_bytes(), path)
            return kept
        made = make()
        write_text(path, exact_text(made))
        self._tick()
        return made

    def drawing(
        self,
        name: str,
        pipe: DiffusionPipeline,
        prompts: PromptSet,
        schedule: Schedule,
        guidance_scale: float,
        progress: Progress,
    ) -> Drawing:
        """As :func:`draw`, every batch kept as it is finished; ``name`` is that of the stage, and of the files.

        Raises:
            InputError: as :func:`draw`. IntegrityError: what was kept was changed.
        """
        parts: list[Drawing] = []
        while (file := self._part(name, len(parts))).exists():
            parts.append(_read_part(file))
        rest = draw_parts(pipe, prompts, schedule, guidance_scale, stage=name, progress=progress, drawn=len(parts))
        for part in rest:
            _write_part(part, self._part(name, len(parts)))
            self._tick()
            parts.append(part)
        return joined_drawing(parts)

    def _part(self, name: str, number: int) -> Path:
        return self.folder / f"{re.sub('[^A-Za-z0-9]+', '-', name)}-{number:05d}.safetensors"

    def _tick(self) -> None:
        write_text(self.folder / _CLOCK, exact_text(self.spent))


def _write_part(part: Drawing, file: Path) -> None:
    arrays = {
        "pictures": part.pictures,
        "trajectory": part.trajectory,
        "timesteps": np.array(part.timesteps, np.float64),
        "seconds": np.array([part.seconds], np.float64),
    }
    write_tensors(file, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})


def _read_part(file: Path) -> Drawing:
    with reading_tensors(file):
        stored = load_file(file)
        timesteps, seconds = tuple(stored["timesteps"].tolist()), stored["seconds"].item()
        return Drawing(stored["pictures"], stored["trajectory"], timesteps, seconds)
