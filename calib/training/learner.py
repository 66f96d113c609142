"""One update of everything that is trained, and all that such updates leave behind: the content of a checkpoint."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import astuple
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from s2p_deploy.calib.training.adapters import adapter_rates, attach_adapters, merge_adapters
from s2p_deploy.calib.training.freezing import Oscillation, freeze_layers
from s2p_deploy.calib.training.log import IterationRecord, SelectionRecord
from s2p_deploy.calib.training.losses import RowErrors
from s2p_deploy.calib.training.row_adam import BETAS, EPS, RowAdam

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from s2p_deploy.calib.training.setting import TrainingSetting
    from s2p_deploy.calib.training.state import TrainingState

CLIP_NORM = 1.0
_WEIGHT_SCALE = "weight_quantizer.log_scale"
_ROWS = "act_scales.rows"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_EMA, _BEST = "ema", "best"
Tensors = dict[str, Tensor]


class Learner:
    """Trains ``state`` in place. Until :meth:`finish`, its weights may have low-rank updates beside them.

    ``iterations`` and ``selections`` are what happened so far; ``kept`` holds the averaged parameters (``ema``) and the
    ``best`` by selection, where they are asked for.
    """

    def __init__(self, state: TrainingState, setting: TrainingSetting) -> None:
        training = setting.training
        if training.adapter_rank:
            attach_adapters(state, training.adapter_rank, training.seed)
        if training.freezing.what == "layers":
            freeze_layers(state, setting.sensitivities or {}, training.freezing.trained)
        state.to(setting.device)
        if training.checkpointing:
            state.denoiser.hot.network.enable_gradient_checkpointing()
        self.state, self.training = state, training
        trained = state.modules().named_parameters()
        self.parameters = {name: parameter for name, parameter in trained if parameter.requires_grad}
        self._start: RowErrors | None = None
        self.iterations: list[IterationRecord] = []
        self.selections: list[SelectionRecord] = []
        self.kept: dict[str, Tensors] = {_EMA: self._values()} if training.ema else {}
        self._row_adam = RowAdam(state.act_scales.rows.detach())
        oscillates = training.freezing.what == "oscillation"
        self._oscillation = Oscillation(state, training.freezing, training.iterations) if oscillates else None
        self._adam = torch.optim.AdamW(self._groups(), betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)

    @property
    def iteration(self) -> int:
        """Updates made so far."""
        return len(self.iterations)

    @property
    def start(self) -> RowErrors:
        """The rows' errors before training."""
        assert self._start is not None, "begin or restore came first"
        return self._start

    def begin(self, start: RowErrors) -> None:
        """Takes the rows' errors before training."""
        self._start = start

    def clear_gradients(self) -> None:
        """Before the first batch of an update."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def update(self, rows: Tensor, factor: float, out: float, feature: float) -> None:
        """One step along the gradients.

        Args:
            rows: int64, distinct: the calibrated rows present.
            factor: scales all rates.
            out: loss of the outputs before the step.
            feature: loss of the features, without its weight.
        """
        updates = self.iteration + 1
        if self._oscillation:
            self._oscillation.before_update()
        nn.utils.clip_grad_norm_(self.parameters.values(), CLIP_NORM)
        for group in self._adam.param_groups:
            group["lr"] = factor * group["full_rate"]
        self._adam.step()
        table = self.state.act_scales.rows
        if table.grad is not None:
            self._row_adam.step(table, table.grad, rows, factor * self.training.act_scale_rate)
        frozen = oscillating = 0
        if self._oscillation:
            self._oscillation.after_update(updates)
            frozen, oscillating = self._oscillation.frozen(), self._oscillation.oscillating(updates)
        self._average(updates)
        self.iterations.append(IterationRecord(out, feature, frozen, oscillating))

    def select(self, error: float) -> None:
        """Notes the error of the held-out trajectories; keeps the parameters where it is the smallest (never NaN)."""
        best = error < min((tried.error for tried in self.selections if tried.best), default=math.inf)
        self.selections.append(SelectionRecord(self.iteration, error, best))
        if best:
            with self.as_kept():
                self.kept[_BEST] = self._values()

    @contextmanager
    def as_kept(self) -> Iterator[None]:
        """Within, the state has the averaged parameters, where there is an average."""
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
        self.state.denoiser.hot.network.disable_gradient_checkpointing()

    def tensors(self) -> Tensors:
        """All of it by name, on any device."""
        named: Tensors = {f"parameter/{name}": value for name, value in self.parameters.items()}
        for name, parameter in self.parameters.items():
            moments = self._adam.state.get(parameter, {})
            named |= {f"{moment}/{name}": moments[moment] for moment in _MOMENTS if moment in moments}
        named |= {f"row_adam/{name}": value for name, value in self._row_adam.named_buffers()}
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
        """Inverse of :meth:`tensors`."""
        self._set(_below("parameter", tensors))
        for name, parameter in self.parameters.items():
            moments = {moment: tensors[f"{moment}/{name}"] for moment in _MOMENTS if f"{moment}/{name}" in tensors}
            if moments:
                self._adam.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
        for name, buffer in self._row_adam.named_buffers():
            buffer.copy_(tensors[f"row_adam/{name}"])
        for kind in (_EMA, _BEST):
            values = _below(kind, tensors)
            if values:
                self.kept[kind] = {name: value.to(self.parameters[name].device) for name, value in values.items()}
        if self._oscillation:
            self._oscillation.restore(_below("oscillation", tensors))
        self._start = RowErrors(*tensors["start"])
        self.iterations = [IterationRecord(*row) for row in tensors["iterations"].tolist()]
        self.selections = [SelectionRecord(int(row[0]), row[1], bool(row[2])) for row in tensors["selections"].tolist()]

    def _values(self) -> Tensors:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    @torch.no_grad()
    def _average(self, updates: int) -> None:
        """The decay grows to its full value, so that the start does not stay in the average of a short training."""
        if _EMA not in self.kept:
            return
        decay = min(self.training.ema, (1 + updates) / (10 + updates))
        for name, parameter in self.parameters.items():
            self.kept[_EMA][name].lerp_(parameter, 1 - decay)

    def _groups(self) -> list[dict[str, object]]:
        """AdamW's; the table of rows has its own."""
        training, static = self.training, self.state.act_scales.static
        adapters = adapter_rates(self.state)
        special = {id(parameter) for group, _ in adapters for parameter in group} | {id(static)}
        rest = {n: p for n, p in self.parameters.items() if n != _ROWS and id(p) not in special}
        groups = [
            ([p for n, p in rest.items() if not n.endswith(_WEIGHT_SCALE)], training.weight_rate),
            ([p for n, p in rest.items() if n.endswith(_WEIGHT_SCALE)], training.weight_scale_rate),
            ([static], training.act_scale_rate),
            *((group, factor * training.weight_rate) for group, factor in adapters),
        ]
        return [{"params": parameters, "full_rate": rate} for parameters, rate in groups if parameters]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}


def _table(rows: list[tuple[float, ...]], columns: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, columns)
