"""What a benchmark found: numbers with how many samples they come from, and the machine they were made on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from s2p_deploy.records import Number

SCHEMA = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Machine(_Record):
    """Processor, ``cores`` that could be used, instruction sets, GPU and versions of what runs engines."""

    processor: str
    cores: int
    flags: tuple[str, ...]
    system: str
    gpu: str | None
    versions: dict[str, str]


class Memory(_Record):
    """Resident bytes of the engine's process: before loading, loaded with one step run, after all steps, at its peak.

    The peak is that of loading and steps; drawing needs a whole pipeline and is not in it.
    """

    before: int
    loaded: int
    steady: int
    peak: int


class Ratios(_Record):
    """An engine's figures over those of the floating-point engine; ``images_per_minute`` is better above one."""

    step: Number
    images_per_minute: Number | None
    load: float
    steady_memory: float
    peak_memory: float
    size: float


class EngineFigures(_Record):
    """One engine. Seconds of wall time; ``size`` in bytes on disk; ``ratios`` None for the baseline itself.

    ``load_seconds`` ends with the first step's result, because some backends compile only then.
    """

    name: str
    digest: str
    recipe: str
    size: int
    load_seconds: float
    memory: Memory
    step_p50: Number
    step_p95: Number
    picture_seconds: Number | None
    images_per_minute: float | None
    ratios: Ratios | None


class BenchResult(_Record):
    """Engines of one backend and hint against the floating-point one, interleaved in ``rounds``.

    ``batch`` samples per step; ``pictures`` of ``sampling_steps`` steps per engine, one at a time.
    """

    kind: str = "Bench"
    schema_version: int = SCHEMA
    machine: Machine
    backend: str
    hint: str
    batch: int
    rounds: int
    steps_per_round: int
    pictures: int
    sampling_steps: int
    baseline: EngineFigures
    engines: tuple[EngineFigures, ...]
