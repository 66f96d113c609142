"""Updates of everything that is trained, and the state that they leave: the content of a checkpoint."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from s2p_deploy.calib.adapters import adapter_rates, attach_adapters, merge_adapters
from s2p_deploy.calib.freezing import Oscillation, freeze_layers
from s2p_deploy.calib.losses import TimestepErrors
from s2p_deploy.errors import S2PError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from s2p_deploy.calib.training import TrainingSetting
    from s2p_deploy.calib.training_state import TrainingState
    from s2p_deploy.recipe import Training

BETAS = (0.9, 0.999)
EPS = 1e-8
CLIP_NORM = 1.0
_WEIGHT_SCALE = "weight_quantizer.log_scale"
_SCALE_TABLE = "act_scales.by_timestep"
READ_EVERY = 16  # updates
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_EMA, _BEST = "ema", "best"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class IterationRecord:
    """Losses before an update (``feature`` without its weight); numbers of weights frozen and flipping after it."""

    out: float
    feature: float
    frozen: float
    oscillating: float

    def loss(self, training: Training) -> float:
        """Computes the minimized sum."""
        return self.out + training.features.weight * self.feature


@dataclass(frozen=True)
class SelectionRecord:
    """The error of the held-out trajectories after ``iteration`` updates, and whether it was the best so far."""

    iteration: int
    error: float
    best: bool


def prepare_parameters(state: TrainingState, training: Training) -> dict[str, nn.Parameter]:
    """Attaches the adapters of a recipe and freezes what it freezes; returns what is trained, by name.

    Raises:
        InputError: the layers that are to be frozen have no sensitivity.
    """
    if training.adapter_rank:
        attach_adapters(state, training.adapter_rank, training.seed)
    if training.freezing.what == "layers":
        freeze_layers(state, training.freezing.trained)
    trained = state.modules().named_parameters()
    return {name: parameter for name, parameter in trained if parameter.requires_grad}


class Learner:
    """Trains ``state`` in place. Until :meth:`finish`, its weights may have low-rank updates beside them.

    ``iterations`` (as of the last :meth:`read`) and ``selections`` record the training so far; ``kept`` holds the
    averaged parameters (``ema``) and the ``best`` by selection, where the recipe has them.
    """

    def __init__(self, state: TrainingState, setting: TrainingSetting) -> None:
        training = setting.training
        if training.checkpointing:
            state.denoiser.inner.network.enable_gradient_checkpointing()
        self.state, self.training = state, training
        self.parameters = prepare_parameters(state, training)
        self._start: TimestepErrors | None = None
        self.iterations: list[IterationRecord] = []
        self._unread: list[Tensor] = []  # float64 [4] each
        self.selections: list[SelectionRecord] = []
        self.kept: dict[str, Tensors] = {_EMA: self._values()} if training.ema else {}
        self._per_timestep_adam = PerTimestepAdam(state.act_scales.by_timestep.detach())
        oscillates = training.freezing.what == "oscillation"
        self._oscillation = Oscillation(state, training.freezing, training.iterations) if oscillates else None
        self._adam = torch.optim.AdamW(self._groups(), betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)

    @property
    def iteration(self) -> int:
        """Updates made so far."""
        return len(self.iterations) + len(self._unread)

    @property
    def start(self) -> TimestepErrors:
        """Errors before training."""
        assert self._start is not None, "begin or restore came first"
        return self._start

    def begin(self, start: TimestepErrors) -> None:
        """Notes the errors before training."""
        self._start = start

    def clear_gradients(self) -> None:
        """Drops the gradients of the last update."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def update(self, positions: Tensor, factor: float, out: Tensor, feature: Tensor) -> None:
        """Takes one step along the gradients. The host does not wait for it, but once in ``READ_EVERY`` updates.

        Args:
            positions: int64, distinct: the calibrated timesteps present.
            factor: scales all rates.
            out: float64 [], loss of the outputs before the step.
            feature: float64 [], loss of the features, without its weight.

        Raises:
            S2PError: as :meth:`read`.
        """
        updates = self.iteration + 1
        if self._oscillation:
            self._oscillation.before_update()
        nn.utils.clip_grad_norm_(self.parameters.values(), CLIP_NORM)
        for group in self._adam.param_groups:
            group["lr"] = factor * group["full_rate"]
        self._adam.step()
        table = self.state.act_scales.by_timestep
        if table.grad is not None:
            self._per_timestep_adam.step(table, table.grad, positions, factor * self.training.act_scale_rate)
        frozen = oscillating = out.new_zeros(())
        if self._oscillation:
            self._oscillation.after_update(updates)
            frozen, oscillating = self._oscillation.frozen(), self._oscillation.oscillating(updates)
        self._average(updates)
        self._unread.append(torch.stack([out, feature, frozen, oscillating]))
        if len(self._unread) == READ_EVERY:
            self.read()

    def read(self) -> None:
        """Reads the records of the latest updates from the device.

        Raises:
            S2PError: a loss was not finite.
        """
        if not self._unread:
            return
        records = [IterationRecord(*values) for values in torch.stack(self._unread).tolist()]
        self._unread.clear()
        for record in records:
            loss = record.loss(self.training)
            if not math.isfinite(loss):
                raise S2PError(
                    f"training loss became {loss} at iteration {self.iteration}: lower the recipe's training rates"
                )
            self.iterations.append(record)

    def select(self, error: float) -> None:
        """Notes the error of the held-out trajectories; keeps the parameters where it is the smallest (never NaN)."""
        best = error < min((tried.error for tried in self.selections if tried.best), default=math.inf)
        self.selections.append(SelectionRecord(self.iteration, error, best))
        if best:
            with self.as_kept():
                self.kept[_BEST] = self._values()

    @contextmanager
    def as_kept(self) -> Iterator[None]:
        """Gives the state the averaged parameters inside, where there is an average."""
        if _EMA not in self.kept:
            yield
            return
        current = self._values()
        self._set(self.kept[_EMA])
        try:
            yield
        finally:
            self._set(current)

    def finish(self) -> None:
        """Gives the state the parameters that are kept: the best, else the average, else the last ones."""
        for name in (_BEST, _EMA):
            if name in self.kept:
                self._set(self.kept[name])
                break
        merge_adapters(self.state)
        self.state.denoiser.inner.network.disable_gradient_checkpointing()

    def tensors(self) -> Tensors:
        """Collects all of it by name, on any device. Raises S2PError as :meth:`read`."""
        self.read()
        named: Tensors = {f"parameter/{name}": value for name, value in self.parameters.items()}
        for name, parameter in self.parameters.items():
            moments = self._adam.state.get(parameter, {})
            named |= {f"{moment}/{name}": moments[moment] for moment in _MOMENTS if moment in moments}
        named |= {f"per_timestep_adam/{name}": value for name, value in self._per_timestep_adam.named_buffers()}
        named |= {f"{kind}/{name}": value for kind, values in self.kept.items() for name, value in values.items()}
        if self._oscillation:
            named |= {f"oscillation/{name}": value for name, value in self._oscillation.tensors().items()}
        return named | {
            "start": torch.stack(astuple(self.start)),
            "iterations": _table([astuple(record) for record in self.iterations], 4),
            "selections": _table([astuple(record) for record in self.selections], 3),
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`tensors` collected."""
        self._set(_below("parameter", tensors))
        for name, parameter in self.parameters.items():
            moments = {moment: tensors[f"{moment}/{name}"] for moment in _MOMENTS if f"{moment}/{name}" in tensors}
            if moments:
                self._adam.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
        for name, buffer in self._per_timestep_adam.named_buffers():
            buffer.copy_(tensors[f"per_timestep_adam/{name}"])
        for kind in (_EMA, _BEST):
            values = _below(kind, tensors)
            if values:
                self.kept[kind] = {name: value.to(self.parameters[name].device) for name, value in values.items()}
        if self._oscillation:
            self._oscillation.restore(_below("oscillation", tensors))
        self._start = TimestepErrors(*tensors["start"])
        self.iterations = [IterationRecord(*record) for record in tensors["iterations"].tolist()]
        selections = tensors["selections"].tolist()
        self.selections = [SelectionRecord(int(iteration), error, bool(best)) for iteration, error, best in selections]

    def _values(self) -> Tensors:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    @torch.no_grad()
    def _average(self, updates: int) -> None:
        """Updates the averaged parameters; the decay grows, so that a short training's average forgets its start."""
        if _EMA not in self.kept:
            return
        decay = min(self.training.ema, (1 + updates) / (10 + updates))
        for name, parameter in self.parameters.items():
            self.kept[_EMA][name].lerp_(parameter, 1 - decay)

    def _groups(self) -> list[dict[str, object]]:
        """Makes AdamW's parameter groups; the table of scales by timestep has an optimizer of its own."""
        training, static = self.training, self.state.act_scales.static
        adapters = adapter_rates(self.state)
        special = {id(parameter) for group, _ in adapters for parameter in group} | {id(static)}
        rest = {n: p for n, p in self.parameters.items() if n != _SCALE_TABLE and id(p) not in special}
        groups = [
            ([p for n, p in rest.items() if not n.endswith(_WEIGHT_SCALE)], training.weight_rate),
            ([p for n, p in rest.items() if n.endswith(_WEIGHT_SCALE)], training.weight_scale_rate),
            ([static], training.act_scale_rate),
            *((group, factor * training.weight_rate) for group, factor in adapters),
        ]
        return [{"params": parameters, "full_rate": rate} for parameters, rate in groups if parameters]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}


def _table(records: list[tuple[float, ...]], columns: int) -> Tensor:
    return torch.tensor(records, dtype=torch.float64).reshape(-1, columns)


class PerTimestepAdam(nn.Module):
    """Adam for a table of which each step sees some timesteps: an absent one is not moved by stale momentum.

    Moments float32 [timesteps, columns] and the number of updates int64 [timesteps], as buffers.
    """

    mean: Tensor
    square: Tensor
    updates: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros_like(table))
        self.register_buffer("square", torch.zeros_like(table))
        self.register_buffer("updates", torch.zeros(len(table), dtype=torch.int64, device=table.device))

    @torch.no_grad()
    def step(self, table: Tensor, gradient: Tensor, positions: Tensor, rate: float) -> None:
        """Moves ``positions`` (int64, distinct) of ``table``; bias correction counts a timestep's own updates."""
        self.updates[positions] += 1
        count = self.updates[positions].unsqueeze(1).double()
        grad = gradient[positions]
        mean = self.mean[positions].lerp(grad, 1 - BETAS[0])
        square = self.square[positions].lerp(grad * grad, 1 - BETAS[1])
        self.mean[positions], self.square[positions] = mean, square
        corrected = mean / (1 - BETAS[0] ** count)
        size = (square / (1 - BETAS[1] ** count)).sqrt()
        table[positions] -= (rate * corrected / (size + EPS)).float()
