"""What a model repository may be asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from s2p_deploy.errors import InputError

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_MOST_INSTANCES, _LONGEST_DELAY = 64, 1_000_000


@dataclass(frozen=True)
class RepositoryOptions:
    """How to lay out a repository.

    ``name`` is what clients ask for, that of the denoiser's model follows from it. ``instances`` sampling loops run at
    once, each with text encoder and VAE of its own. The denoiser waits up to ``queue_delay`` microseconds for steps of
    other loops. With ``fixed_batch`` it always runs on as many samples as all loops together bring, padded: a picture's
    bits then depend on nothing that is drawn beside it. ``native`` leaves the engine's file to Triton's own backend for
    its kind. ``steps`` are step counts besides the recipe's, which an engine with fractional timesteps must know ahead;
    none may be above ``most_steps``.
    """

    name: str
    instances: int = 2
    queue_delay: int = 1000
    fixed_batch: bool = False
    native: bool = False
    with_pipeline: bool = False
    steps: tuple[int, ...] = ()
    most_steps: int = 100

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"{self.name!r} is no name for a model: a letter, then up to 63 letters, digits, - or _; pass --name"
            )
        if not 1 <= self.instances <= _MOST_INSTANCES:
            raise InputError(f"{self.instances} instances: give 1 to {_MOST_INSTANCES}")
        if not 0 <= self.queue_delay <= _LONGEST_DELAY:
            raise InputError(f"a queue delay of {self.queue_delay} microseconds: give 0 to {_LONGEST_DELAY}")
        if self.fixed_batch and self.native:
            raise InputError("a fixed batch is padded by this package: leave --fixed-batch or --native out")
        wrong = [steps for steps in self.steps if not 1 <= steps <= self.most_steps]
        if wrong or self.most_steps < 1:
            raise InputError(f"{(*wrong, self.most_steps)[0]} steps: give 1 to the most, which is {self.most_steps}")

    @property
    def denoiser(self) -> str:
        """The name of the denoiser's model."""
        return f"{self.name}_denoiser"
