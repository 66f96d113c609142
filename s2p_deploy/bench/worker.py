"""The child process of one engine: ``python -m s2p_deploy.bench.worker``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.bench.workload import random_inputs, serve_workload
from s2p_deploy.engines import ShapeProfile, load_engine
from s2p_deploy.errors import IntegrityError
from s2p_deploy.records import Base, Engine, Prompt

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_PROMPT = "a large red circle on the left and a small blue square on the right, white background"


class EngineWorkload:
    """An engine, and the pipeline that it was made from. ``drawing`` says where that is and how to sample."""

    def __init__(self, engine: Engine, batch: int, drawing: dict[str, Any] | None) -> None:
        self._engine = engine
        self._runner = load_engine(self._engine, tried=True)  # this process may crash: its parent lives on
        profile = ShapeProfile.from_json(engine.manifest.content["profile"])
        self._sizes = profile.sizes("optimum") | {"batch": batch}
        self._drawing = drawing or {}
        self._pipe: DiffusionPipeline | None = None

    def step(self, number: int) -> None:
        """One call of the engine on random latents and text, on one calibrated row after the other."""
        rows = self._engine.timesteps.calibrated_rows
        self._runner.infer(random_inputs(self._runner.inputs, self._sizes, rows[number % len(rows)], number))

    def open_pipeline(self) -> None:
        """Loads the stock pipeline with the engine as its denoiser."""
        from s2p_deploy.families import BasePipeline, load_pipeline
        from s2p_deploy.pipeline import pipeline_with_engine

        found = self._drawing
        base = BasePipeline(
            Path(found["folder"]),
            Base(found["source"], found["digest"]),
            found["guidance_scale"],
            found["pipeline_class"],
        )
        self._pipe = pipeline_with_engine(load_pipeline(base), self._engine, self._runner)

    def draw(self, number: int) -> None:
        """One picture; ``number`` decides its noise."""
        from s2p_deploy.pipeline import Schedule, generate

        assert self._pipe is not None  # the pipeline is opened first
        found = self._drawing
        schedule = Schedule(found["steps"], max_sequence_length=found["max_sequence_length"])
        generate(
            self._pipe, Prompt("bench", _PROMPT), schedule=schedule, guidance_scale=found["guidance_scale"], seed=number
        )


def _opened(request: dict[str, Any]) -> EngineWorkload:
    engine = Engine.open(Path(request["engine"]))
    if engine.manifest.digest != request["digest"]:
        raise IntegrityError("it was changed while it was opened")
    return EngineWorkload(engine, request["batch"], request["drawing"])


if __name__ == "__main__":
    serve_workload(_opened)
