"""What a training takes of a device's memory, and the division of its batches that fits.

The bytes are counted by making one iteration on fake tensors, which have shapes and no values, with the very classes
that train: nothing here knows a model.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch._subclasses import FakeTensorMode

from s2p_deploy.calib.freezing import Oscillation
from s2p_deploy.calib.learner import prepare_parameters
from s2p_deploy.calib.losses import Objective, OutputLoss
from s2p_deploy.calib.memory import SHARE, LiveBytes, gib, in_blocks
from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser, weight_format
from s2p_deploy.calib.samples import Batch
from s2p_deploy.calib.training import TrainingSetting
from s2p_deploy.calib.training_state import ActScales, TrainingState
from s2p_deploy.context import duration
from s2p_deploy.errors import MissingEnvironmentError
from s2p_deploy.families import latent_shape_of
from s2p_deploy.families.layers import sample_shape_of
from s2p_deploy.numerics import INT4, INT8, fake_quantize, weight_scale_shape
from s2p_deploy.recipe import Freezing

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.recipe import Training
    from s2p_deploy.records import PrecisionPlan

_PASSES = 6  # forward passes that an iteration takes as long as; one more where activations are computed again
_TIMESTEPS = 50
_MOMENTS = 2  # of Adam
_LEAST = 8  # samples; fewer at once cost a GPU more than recomputing activations does. A judgement, not measured
_ELSEWHERE = "use --device cpu, or recipe ptq-stream"
_RANK = 16  # of the adapters that are proposed where a whole training does not fit


@dataclass(frozen=True)
class Network:
    """What a training's memory depends on beside its recipe.

    ``denoiser`` is transformed and on the meta device, ``tokens`` the length of its text states; ``teacher`` says
    whether a floating-point copy stays beside it.
    """

    denoiser: IndexedDenoiser
    plan: PrecisionPlan
    tokens: int
    teacher: bool = False


@dataclass(frozen=True)
class Division:
    """How the samples of an update are computed: ``accumulate`` batches, with activations recomputed or kept."""

    batch: int
    accumulate: int
    checkpointing: bool

    @staticmethod
    def of(training: Training) -> Division:
        """Returns the division that a recipe's section has."""
        return Division(training.batch, training.accumulate, training.checkpointing)

    def __str__(self) -> str:
        return f"{self.batch} x {self.accumulate}{' with checkpointing' if self.checkpointing else ''}"


class Account(Protocol):
    """Knows the bytes of a training."""

    def peak(self, division: Division) -> int:
        """Counts the most bytes that live at once in an iteration."""


class TrainingAccount:
    """The bytes of a network's training, counted on fake tensors. Peaks take seconds to a minute and are kept."""

    def __init__(self, network: Network, training: Training) -> None:
        _read_limits_of_formats()
        self.network, self.training = network, training
        self._mode, self._live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
        self._peaks: dict[Division, int] = {}
        # which layers are frozen follows from scores that come later; all are trained here
        layers = training.freezing.what == "layers"
        training = training.model_copy(update={"freezing": Freezing()}) if layers else training
        denoiser = copy.deepcopy(network.denoiser)
        teacher = copy.deepcopy(network.denoiser) if network.teacher else None
        with self._mode:
            denoiser.to_empty(device="cpu").eval()
            self._live.add(_tensors(denoiser))
            self.weights = self._live.now
            if teacher is not None:
                teacher.to_empty(device="cpu").eval()
            state = _fake_state(denoiser, network.plan)
            self._parameters = list(prepare_parameters(state, training).values())
            self._live.add([*_tensors(state.modules()), *(() if teacher is None else _tensors(teacher))])
            if training.freezing.what == "oscillation":
                self._oscillation = Oscillation(state, training.freezing, training.iterations)
                self._live.add(self._oscillation.tensors().values())
            setting = TrainingSetting(training, OutputLoss(training), teacher=teacher)
            self._state, self._objective = state, Objective(setting, state, torch.ones(_TIMESTEPS))
        self.gradients = sum(in_blocks(parameter.numel() * parameter.element_size()) for parameter in self._parameters)
        copies = _MOMENTS + bool(training.ema) + bool(training.selection.prompts)
        # Adam's moments and counts of steps, the average and the best parameters
        self.kept = copies * self.gradients + in_blocks(4) * len(self._parameters)

    @cached_property
    def with_adapters(self) -> TrainingAccount:
        """Returns the account of the same training through low-rank adapters."""
        return TrainingAccount(self.network, self.training.model_copy(update={"adapter_rank": _RANK}))

    @property
    def resting(self) -> int:
        """Returns the bytes between two iterations, beside the denoiser's own weights."""
        return self._live.now - self.weights + self.gradients + self.kept

    def peak(self, division: Division) -> int:
        """Counts the most bytes that live at once in an iteration."""
        if division not in self._peaks:
            network = self._state.denoiser.inner.network
            network.disable_gradient_checkpointing()
            if division.checkpointing:
                network.enable_gradient_checkpointing()
            with self._mode, self._live:
                for parameter in self._parameters:  # of the batches before
                    parameter.grad = torch.empty_like(parameter) if division.accumulate > 1 else None
                self._live.most = self._live.now
                self._objective.add_gradients(self._batch(division.batch), 1.0)
                most = self._live.most
                for parameter in self._parameters:
                    parameter.grad = None
            self._peaks[division] = most + self.kept
        return self._peaks[division]

    def call(self, samples: int) -> int:
        """Counts the most bytes of a call without gradients, beside what rests."""
        with self._mode, self._live, torch.no_grad():
            inputs = self._batch(samples).inputs()
            before = self._live.most = self._live.now
            self._state.predict(*inputs)
            return self._live.most - before

    def _batch(self, samples: int) -> Batch:
        denoiser = self.network.denoiser
        config = denoiser.config
        width = denoiser.family.text_width(config)
        indices = torch.zeros(2, samples, dtype=torch.int64)
        return Batch(
            sample=torch.empty(samples, *sample_shape_of(config)),
            timestep_index=indices[0],
            position=indices[1],
            texts=torch.empty(samples, self.network.tokens, width),
            added_cond=torch.empty(samples, denoiser.added_width),
            target=torch.empty(samples, *latent_shape_of(config)),
        )


def _fake_state(denoiser: IndexedDenoiser, plan: PrecisionPlan) -> TrainingState:
    scales = {
        layer.name: torch.ones(weight_scale_shape(denoiser.network.get_submodule(layer.name).weight))
        for layer in plan.layers
        if weight_format(layer) is not None
    }
    static = [not quantizer.timestep_dependent for quantizer in plan.activation_quantizers]
    act_scales = ActScales(torch.ones(_TIMESTEPS, len(static)), static)
    return TrainingState(QuantizedDenoiser(denoiser, plan, scales), act_scales, torch.arange(_TIMESTEPS))


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _read_limits_of_formats() -> None:
    """Lets fake quantization read what it reads of a format once, before it meets tensors that cannot be read."""
    for fmt in (INT4, INT8):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(1, dtype=dtype, requires_grad=True)
            fake_quantize(x, torch.ones(1, dtype=dtype), fmt).sum().backward()


@dataclass(frozen=True)
class Fit:
    """A division whose iterations take ``bytes`` of a device that has ``memory``.

    ``resting`` bytes stay between iterations, beside the denoiser's weights.
    """

    division: Division
    iterations: int
    bytes: int
    memory: int
    resting: int
    stage: ClassVar[str] = "training"

    def __str__(self) -> str:
        what = f"{self.iterations} iterations of {self.division}" if self.iterations else "none, calls of one sample"
        return f"{what}: {gib(self.bytes)} of {gib(self.memory)}"


def divisions(training: Training, stated: Collection[str]) -> list[Division]:
    """Lists the divisions to choose from, the fastest first and the smallest last; all have ``batch * accumulate``.

    Those of ``batch``, ``accumulate`` and ``checkpointing`` that are ``stated`` stay as they are.
    """
    samples = training.batch * training.accumulate
    batches = [samples >> halvings for halvings in range(samples.bit_length()) if samples % (1 << halvings) == 0]
    splits = [(batch, samples // batch) for batch in batches]
    if "batch" in stated or "accumulate" in stated:
        splits = [(training.batch, training.accumulate)]
    if "checkpointing" in stated:
        return [Division(*split, checkpointing=training.checkpointing) for split in splits]
    kept = [split for split in splits if split[0] >= _LEAST or split == splits[0]]
    return [Division(*split, checkpointing=False) for split in kept] + [
        Division(*split, checkpointing=True) for split in splits
    ]


def fit_training(account: TrainingAccount, memory: int) -> Fit:
    """Chooses how a training is divided so that it takes no more than a share of ``memory`` bytes.

    Raises:
        MissingEnvironmentError: it does not fit in any way that the recipe leaves open, or without training one sample
            does not; says what would.
    """
    training = account.training
    room = int(SHARE * memory)
    usable = f"{gib(room)} of {gib(memory)} can be used"
    if not training.iterations:
        needed = account.weights + account.call(1)
        if needed > room:
            raise MissingEnvironmentError(f"the denoiser and one sample take {gib(needed)}, and {usable}: {_ELSEWHERE}")
        return Fit(Division.of(training), 0, needed, memory, 0)
    choices = divisions(training, training.model_fields_set)
    chosen = first_that_fits(account, choices, room)
    if chosen is None:
        least = f"training takes {gib(account.peak(choices[-1]))} at {choices[-1]}, and {usable}"
        raise MissingEnvironmentError(f"{least}: {' or '.join(_advice(account, room))}")
    return Fit(chosen, training.iterations, account.peak(chosen), memory, account.resting)


def first_that_fits(account: Account, choices: Sequence[Division], room: int) -> Division | None:
    """Finds the first of :func:`divisions` that takes no more than ``room`` bytes, with few looks at the account."""
    for checkpointing in (False, True):  # each from large to small
        group = [choice for choice in choices if choice.checkpointing == checkpointing]
        found = bisect_left(group, True, key=lambda choice: account.peak(choice) <= room)
        if found < len(group):
            return group[found]
    return None


def _advice(account: TrainingAccount, room: int) -> list[str]:
    """Lists what would fit."""
    training = account.training
    choices, found = divisions(training, ()), []
    chosen = first_that_fits(account, choices, room)
    if chosen is not None:
        return [f"leave batch, accumulate and checkpointing out of the recipe ({chosen} fits)"]
    if not training.adapter_rank and training.freezing.what != "oscillation":
        chosen = first_that_fits(account.with_adapters, choices, room)
        if chosen is not None:
            needed = gib(account.with_adapters.peak(chosen))
            found.append(f"--set training.adapter_rank={_RANK} ({chosen}, {needed})")
    if account.weights + account.call(1) <= room:
        found.append("--recipe w8a8, which trains nothing")
    return found or [_ELSEWHERE]


@dataclass(frozen=True)
class TrainingTime:
    """The seconds that a training will take, from those of a forward pass of one update's samples."""

    division: Division
    iterations: int
    forward_s: float
    stage: ClassVar[str] = "training"

    @property
    def seconds(self) -> float:
        """Returns the estimate; on processors iterations took 4 to 7 forward passes of the floating-point denoiser."""
        return self.iterations * self.forward_s * (_PASSES + self.division.checkpointing)

    def __str__(self) -> str:
        return f"{self.iterations} iterations of {self.division}, about {duration(self.seconds)}"
