"""Checkpoint of a validation: what is finished is kept in its work folder, and a second start goes on from there."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import numpy as np
import torch
from safetensors.numpy import load_file

from s2p_deploy.records.files import write_tensors, write_text
from s2p_deploy.records.typed_json import reading_tensors
from s2p_deploy.validation.measurements import Measurements, from_json, to_json
from s2p_deploy.validation.pictures import GeneratedPictures, generate_batches, joined_pictures

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from s2p_deploy.context import Progress
    from s2p_deploy.families.pictures import PictureInputs
    from s2p_deploy.pipeline import Schedule
    from s2p_deploy.records import PromptSet

_CLOCK = "clock.json"
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Spent:
    """Wall ``seconds`` of a validation over all its ``starts``.

    Of a start that was killed, what came after its last finished part is neither kept nor counted.
    """

    starts: int
    seconds: float


@dataclass(frozen=True)
class ValidationCheckpoint:
    """Finished parts in ``folder``; ``before`` is what earlier starts spent, ``began`` this one's clock."""

    folder: Path
    before: Spent
    began: float

    @staticmethod
    def begin(folder: Path) -> ValidationCheckpoint:
        """Begins a start in a work folder that this process has locked."""
        clock = folder / _CLOCK
        before: Spent = from_json(Spent, clock.read_bytes(), clock) if clock.exists() else Spent(0, 0.0)
        checkpoint = ValidationCheckpoint(folder, before, time.perf_counter())
        checkpoint._tick()
        return checkpoint

    @property
    def spent(self) -> Spent:
        """Starts and seconds so far, this start included."""
        return Spent(self.before.starts + 1, self.before.seconds + time.perf_counter() - self.began)

    def measure(self, name: str, make: Callable[[], _Value]) -> _Value:
        """Returns the field ``name`` of :class:`Measurements`: as an earlier start kept it, or made and kept now.

        Raises:
            IntegrityError: what was kept was changed.
        """
        path, kind = self.folder / f"{name}.json", get_type_hints(Measurements)[name]
        if path.exists():
            kept: _Value = from_json(kind, path.read_bytes(), path)
            return kept
        made = make()
        write_text(path, to_json(kind, made))
        self._tick()
        return made

    def pictures(  # noqa: PLR0913 - as generate_pictures
        self,
        name: str,
        pipe: DiffusionPipeline,
        prompts: PromptSet,
        schedule: Schedule,
        guidance_scale: float,
        progress: Progress,
        *,
        inputs: PictureInputs | None = None,
    ) -> GeneratedPictures:
        """Generates as :func:`generate_pictures` and keeps finished batches; ``name`` is the stage's and the files'.

        Raises:
            InputError: as :func:`generate_pictures`. IntegrityError: what was kept was changed.
        """
        parts: list[GeneratedPictures] = []
        while (file := self._part(name, len(parts))).exists():
            parts.append(_read_part(file))
        options: dict[str, Any] = {"inputs": inputs, "stage": name, "progress": progress, "skip": len(parts)}
        rest = generate_batches(pipe, prompts, schedule, guidance_scale, **options)
        for part in rest:
            _write_part(part, self._part(name, len(parts)))
            self._tick()
            parts.append(part)
        return joined_pictures(parts, inputs)

    def _part(self, name: str, number: int) -> Path:
        return self.folder / f"{re.sub('[^A-Za-z0-9]+', '-', name)}-{number:05d}.safetensors"

    def _tick(self) -> None:
        write_text(self.folder / _CLOCK, to_json(Spent, self.spent))


def _write_part(part: GeneratedPictures, file: Path) -> None:
    arrays = {
        "pictures": part.pictures,
        "trajectory": part.trajectory,
        "timesteps": np.array(part.timesteps, np.float64),
        "seconds": np.array([part.seconds], np.float64),
    }
    write_tensors(file, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})


def _read_part(file: Path) -> GeneratedPictures:
    with reading_tensors(file):
        stored = load_file(file)
        timesteps, seconds = tuple(stored["timesteps"].tolist()), stored["seconds"].item()
        return GeneratedPictures(stored["pictures"], stored["trajectory"], timesteps, seconds)
