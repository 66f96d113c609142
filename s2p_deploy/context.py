"""Context: where and how a stage runs, apart from what it computes."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from s2p_deploy.errors import InputError, MissingEnvironmentError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch


MOST_SEED = 2**63 - 1  # of PyTorch's generators


class Progress(Protocol):
    """Called after every unit of work; ``done`` starts above zero where a run was resumed.

    Example:
        >>> def show(stage: str, done: int, total: int) -> None:
        ...     print(f"{stage}: {done} of {total}")
        >>> Context(progress=show).progress("train", 1, 20)
        train: 1 of 20
    """

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Reports that ``done`` of ``total`` units of ``stage`` are finished."""


def silent(stage: str, done: int, total: int) -> None:
    """Shows no progress."""


@dataclass(frozen=True)
class Context:
    """The machine's side of a stage: every stage takes one, and none reads a device or a thread count elsewhere.

    Args:
        device: ``auto`` (a CUDA device where there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: floating-point type that networks compute in outside an engine.
        threads: CPU threads of PyTorch's operators; None keeps PyTorch's own number. Bits depend on it.
        work: folder for unfinished work; None puts it beside the artifact that is being made.
        seed: replaces the recipe's seed; None keeps it.
        progress: told about every unit of work.
        tf32: lets a GPU round the operands of float32 products to TF32: faster, and other bits. Off for calibration's
            sake: its scales are compared to 1e-6.
        deterministic: has a GPU add in the same order every time, so that a resumed run ends in the same bits; slower.
        memory_limit: bytes that a training may plan with; None: what a GPU has free, and no limit on a CPU.
        samples_per_call: most samples of a call without gradients; None: as many as a GPU's memory holds, and the
            stages' own numbers on a CPU. Bits depend on it.

    Example:
        >>> model = calibrate("shapes", recipe="fp", out="build/fp", context=Context(device="cpu", threads=1))
    """

    device: str = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    threads: int | None = None
    work: Path | None = None
    seed: int | None = None
    progress: Progress = silent
    tf32: bool = False
    deterministic: bool = False
    memory_limit: int | None = None
    samples_per_call: int | None = None

    @property
    def torch_device(self) -> torch.device:
        """Returns the device, with ``auto`` resolved.

        Raises:
            InputError: it is no name of a device that engines and networks run on.
            MissingEnvironmentError: PyTorch sees no such device.
        """
        import torch

        available = torch.cuda.is_available()
        if self.device == "auto":
            if os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}:  # accelerate launch --cpu
                return torch.device("cpu")
            return torch.device("cuda" if available else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise InputError(f"unknown device {self.device!r}: use auto, cpu, cuda or cuda:N") from error
        if device.type == "cuda":
            count = torch.cuda.device_count() if available else 0
            if (device.index or 0) >= count:
                raise MissingEnvironmentError(
                    f"device {self.device}: PyTorch sees {count} CUDA devices here; use --device cpu or another machine"
                )
        elif device.type != "cpu":
            raise InputError(f"device {self.device}: use auto, cpu, cuda or cuda:N")
        return device

    @property
    def torch_dtype(self) -> torch.dtype:
        """Returns the floating-point type as PyTorch names it."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def arithmetic_name(self) -> str:
        """Names what :meth:`arithmetic` sets: it decides bits on a GPU."""
        return f"{'TF32' if self.tf32 else 'float32'}{', deterministic' if self.deterministic else ''}"

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Sets how a GPU computes inside, as ``tf32`` and ``deterministic`` say; a CPU computes as ever."""
        import torch

        matmul, before = torch.backends.cuda.matmul, torch.are_deterministic_algorithms_enabled()
        tf32 = matmul.allow_tf32
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        try:
            matmul.allow_tf32 = self.tf32
            torch.use_deterministic_algorithms(self.deterministic or before)
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=self.tf32):
                yield
        finally:
            matmul.allow_tf32 = tf32
            torch.use_deterministic_algorithms(before)

    def set_threads(self) -> int:
        """Sets the process's number of PyTorch threads where one is given; returns the number in force."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return torch.get_num_threads()


def duration(seconds: float) -> str:
    """Formats seconds in the unit that reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
