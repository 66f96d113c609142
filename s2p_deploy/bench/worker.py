"""The child process of one engine, ``python -m s2p_deploy.bench.worker``: loads, runs steps and generates pictures.

It reports how long each takes and the memory that it holds.
"""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from s2p_deploy.bench.turns import answer_requests
from s2p_deploy.context import Context
from s2p_deploy.engines import load_engine
from s2p_deploy.engines.options import shape_at
from s2p_deploy.engines.runner import OUTPUT, TensorRunner
from s2p_deploy.errors import IntegrityError
from s2p_deploy.records import Base, Engine, Prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from s2p_deploy.engines import BoundRunner
    from s2p_deploy.records import TensorSpec

_OF_THE_PROMPT = {"encoder_hidden_states", "added_cond"}
_GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples' fractions spread over 0 to 1 evenly, however many there are
_UNITS = {"rss": "VmRSS", "peak": "VmHWM"}
_PROMPT = "a large red circle on the left and a small blue square on the right, white background"


class Workload(Protocol):
    """Something loaded that can be run."""

    def step(self, number: int) -> None:
        """Runs one call of the denoiser, on other latents than the call before."""

    def open_pipeline(self) -> None:
        """Loads what generation needs besides the denoiser."""

    def draw(self, number: int) -> None:
        """Generates one picture from text to pixels."""


def serve_workload(opened: Callable[[dict[str, Any]], Workload]) -> None:
    """Answers requests about a workload that ``opened`` makes of the first one.

    ``load`` opens it and runs one step, because some backends compile only then; ``steps`` runs one step unmeasured and
    then ``count``; ``pipeline`` and ``picture`` generate pictures. Times are wall seconds, memory is in bytes.
    """
    workloads: list[Workload] = []
    calls = iter(range(2**62))

    def load(request: dict[str, Any]) -> dict[str, Any]:
        before = memory()
        start = time.perf_counter()
        workloads[:] = [opened(request)]
        workloads[0].step(next(calls))
        return {"seconds": time.perf_counter() - start, "before": before["rss"], "loaded": memory()["rss"]}

    def steps(request: dict[str, Any]) -> dict[str, Any]:
        workloads[0].step(next(calls))
        return {"seconds": [_timed(workloads[0].step, next(calls)) for _ in range(request["count"])]} | memory()

    def pipeline(_request: dict[str, Any]) -> dict[str, Any]:
        workloads[0].open_pipeline()
        return {}

    def picture(request: dict[str, Any]) -> dict[str, Any]:
        return {"seconds": _timed(workloads[0].draw, request["number"])}

    answer_requests({"load": load, "steps": steps, "pipeline": pipeline, "picture": picture})


def memory() -> dict[str, int]:
    """Reads the bytes resident in this process: ``rss`` now, ``peak`` since its start (Linux; 0 elsewhere)."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields.get(field, "0").split()[0]) * 1024 for name, field in _UNITS.items()}


def random_inputs(
    specs: Sequence[TensorSpec], sizes: Mapping[str, int], timestep_index: int, number: int
) -> dict[str, NDArray[Any]]:
    """Draws standard normal values for every input but ``timestep_index``, which all samples share as in a pipeline.

    ``sizes`` gives every dynamic size by its name. What comes from the prompt is the same for every ``number``, as it
    is for a picture's steps.
    """
    of_step, of_prompt = np.random.default_rng(number), np.random.default_rng(0)
    values: dict[str, NDArray[Any]] = {}
    for spec in specs:
        shape = shape_at(spec, sizes)
        if spec.name == "timestep_index":
            values[spec.name] = np.full(shape, timestep_index, np.int64)
        else:
            random = of_prompt if spec.name in _OF_THE_PROMPT else of_step
            values[spec.name] = random.standard_normal(shape).astype(spec.dtype)
    return values


class EngineWorkload:
    """A loaded engine, and the pipeline that it was made from. ``generation`` says where that is and how to sample.

    ``context`` has the device of the engine, for the networks around it and for inputs of an engine that takes tensors.
    """

    def __init__(
        self,
        engine: Engine,
        runner: BoundRunner,
        batch: int,
        generation: dict[str, Any] | None,
        context: Context,
    ) -> None:
        self._engine, self._runner, self._context = engine, runner, context
        self._sizes = engine.profile.sizes("optimum") | {"batch": batch}
        self._generation = generation or {}
        self._pipe: DiffusionPipeline | None = None

    def step(self, number: int) -> None:
        """Runs one call of the engine on random latents and text, on calibrated timesteps spread over the schedule.

        However few the calls are, either of joined engines then has about its share of them.
        """
        indices = self._engine.timesteps.calibrated_indices
        index = indices[int(number * _GOLDEN_RATIO % 1 * len(indices))]
        if isinstance(self._runner, TensorRunner):
            self._step_on_device(self._runner, index)
        else:
            self._runner.infer(random_inputs(self._runner.inputs, self._sizes, index, number))

    def _step_on_device(self, runner: TensorRunner, timestep_index: int) -> None:
        """Runs a step as a pipeline's loop there does: nothing but the timestep comes from the host."""
        import torch

        sample = torch.randn(self._sample_shape, device=self._context.torch_device)
        index = torch.full((len(sample),), timestep_index)
        output = runner.infer_tensors({"sample": sample, "timestep_index": index, **self._prompt})[OUTPUT]
        output.flatten()[:1].cpu()  # waits for the step

    @cached_property
    def _sample_shape(self) -> tuple[int, ...]:
        return next(shape_at(spec, self._sizes) for spec in self._runner.inputs if spec.name == "sample")

    @cached_property
    def _prompt(self) -> dict[str, torch.Tensor]:
        """Returns what comes from the prompt, on the device once for all steps."""
        import torch

        specs = [spec for spec in self._runner.inputs if spec.name in _OF_THE_PROMPT]
        values = random_inputs(specs, self._sizes, 0, 0)
        return {name: torch.from_numpy(value).to(self._context.torch_device) for name, value in values.items()}

    def open_pipeline(self) -> None:
        """Opens the engine's pipeline, as users do."""
        from s2p_deploy.families import BasePipeline
        from s2p_deploy.pipeline import open_pipeline

        generation = self._generation
        base = BasePipeline(
            Path(generation["folder"]),
            Base(generation["source"], generation["digest"]),
            generation["guidance_scale"],
            generation["pipeline_class"],
        )
        self._pipe = open_pipeline(self._engine, base, runner=self._runner, context=self._context).pipe

    def draw(self, number: int) -> None:
        """Generates one picture; ``number`` decides its noise."""
        from s2p_deploy.families.pipelines import task_of
        from s2p_deploy.pipeline import Schedule, StartPicture, generate, trained_size

        assert self._pipe is not None  # the pipeline is opened first
        generation = self._generation
        schedule = Schedule(
            generation["steps"],
            max_sequence_length=generation["max_sequence_length"],
            strength=generation["strength"],
        )
        task, size = task_of(type(self._pipe).__name__), trained_size(self._pipe)
        blank = StartPicture.blank(*size, schedule.strength, masked=task == "inpainting")
        generate(
            self._pipe,
            Prompt("bench", _PROMPT),
            schedule=schedule,
            guidance_scale=generation["guidance_scale"],
            seed=number,
            start=None if task == "text-to-image" else blank,
        )


def _opened(request: dict[str, Any]) -> EngineWorkload:
    engine = Engine.open(Path(request["engine"]))
    if engine.manifest.digest != request["digest"]:
        raise IntegrityError("it was changed while it was opened")
    schedules = [request["generation"]["timesteps"]] if request["generation"] else []
    runner = load_engine(engine, schedules=schedules, tried=True)  # this process may crash: its parent lives on
    return EngineWorkload(engine, runner, request["batch"], request["generation"], context_of(engine))


def context_of(engine: Engine) -> Context:
    """Puts the networks around an engine on its device, on a GPU in the graph's type."""
    half = engine.on_gpu and engine.dtype == "fp16"
    return Context(device="auto" if engine.on_gpu else "cpu", dtype="float16" if half else "float32")


def _timed(run: Callable[[int], None], number: int) -> float:
    start = time.perf_counter()
    run(number)
    return time.perf_counter() - start


if __name__ == "__main__":
    serve_workload(_opened)
