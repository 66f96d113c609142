"""The result of a benchmark: numbers with how many samples they come from, and the machine they were measured on."""

from __future__ import annotations

import os
import platform

from pydantic import BaseModel, ConfigDict

from s2p_deploy.engines.machine import cpu_flags, distribution_version, processor_info
from s2p_deploy.records import Number

SCHEMA = 1
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_LIBRARIES = ("torch", "diffusers", "onnxruntime", "openvino", "tensorrt-rtx", "tensorrt", "numpy")


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


class GainGate(_Record):
    """A limit on an engine's gain: ``value`` (None: it could not be measured) must be at least ``limit``."""

    name: str
    limit: float
    value: float | None
    passed: bool


class EngineFigures(_Record):
    """One engine. Seconds of wall time; ``size`` in bytes on disk; ``ratios`` None for the baseline itself.

    ``load_seconds`` ends with the first step's result, because some backends compile only then. ``int8_share`` of the
    layers with quantized weights and activations are computed in INT8, as the backend reports; None where there are
    none, or it reports nothing. ``gates`` are those that are switched on.
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
    int8_share: float | None = None
    gates: tuple[GainGate, ...] = ()


class BenchResult(_Record):
    """Engines of one backend, run alike, against the floating-point one, interleaved in ``rounds``.

    ``batch`` samples per step; ``pictures`` of ``sampling_steps`` steps per engine, one at a time.
    """

    kind: str = "Bench"
    schema_version: int = SCHEMA
    machine: Machine
    backend: str
    precision: str
    provider: str | None
    optimization: str | None
    batch: int
    rounds: int
    steps_per_round: int
    pictures: int
    sampling_steps: int
    baseline: EngineFigures
    engines: tuple[EngineFigures, ...]


def this_machine() -> Machine:
    """Describes this machine, without its name or any path: processor, usable cores, flags that matter, versions."""
    flags = cpu_flags()
    libraries = {name: found for name in _LIBRARIES if (found := distribution_version(name)) is not None}
    return Machine(
        processor=processor_info().get("model name") or platform.machine(),
        cores=_usable_cores(),
        flags=tuple(flag for flag in _FLAGS if flag in flags),
        system=f"{platform.system()} {platform.machine()}",
        gpu=_gpu(),
        versions={"python": platform.python_version()} | libraries,
    )


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
