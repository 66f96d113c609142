"""Runners whose inputs and outputs are tensors on the GPU: a sampling loop there moves no data through the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from s2p_deploy.engines.conditioning import StoredFeatures
from s2p_deploy.engines.runner import ADDED_COND, PROJECTIONS, TEXT, TEXT_PROJECTIONS, BoundRunner, Runner
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


@runtime_checkable
class TensorRunner(Runner, Protocol):
    """A runner that also takes and gives tensors on the GPU."""

    def infer_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name on the GPU, ordered on PyTorch's current stream; valid until the next call.

        ``inputs`` may lie on any device and in any floating-point type.
        """


@dataclass(frozen=True)
class _SeenText:
    """Text states, at a version that PyTorch counts, and their products on the GPU.

    The states are held, so that their memory is not given to other tensors.
    """

    states: torch.Tensor
    version: int
    projections: torch.Tensor

    def is_of(self, states: torch.Tensor) -> bool:
        """Whether ``states`` are the very same memory, and nothing was written there since."""
        if states.is_inference():  # PyTorch counts no writes to these
            return False
        ours, theirs = ((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in (self.states, states))
        return ours == theirs and self.version == states._version


class BoundTensorRunner(BoundRunner):
    """A bound engine whose runner takes tensors: what is bound is on the GPU, ``infer`` is as ever."""

    _seen: _SeenText | None = None

    def infer_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``noise_pred`` [batch, C, H, W] on the GPU, valid until the next call.

        Args:
            inputs: ``sample`` and ``encoder_hidden_states`` on the GPU, ``step_index`` int64 [batch] on the host: its
                rows are checked there, so that nothing waits for the GPU.

        Raises:
            InputError: an input is missing, has another shape than the engine's, or a row is outside the scale table.
        """
        runner = self._runner
        if not isinstance(runner, TensorRunner):
            raise InputError("this engine's runner takes no tensors: call infer")
        self._check(inputs)
        given = {name: tensor for name, tensor in inputs.items() if name != ADDED_COND}
        if self.features is not None:
            given[PROJECTIONS] = self._projections(inputs)
        if self.texts is not None:
            given[TEXT_PROJECTIONS] = self._text_projections(given.pop(TEXT))
        return runner.infer_tensors(given)

    def _projections(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of a stored table without a way through the host; those of a prompt come from there."""
        import torch

        rows = inputs["step_index"]
        if self._table is not None:
            return self._table[rows.to(self._table.device, non_blocking=True)]
        assert self.features is not None, "the caller looked"
        return torch.from_numpy(self.features.of(rows.numpy(), inputs[ADDED_COND].float().cpu().numpy()))

    def _text_projections(self, states: torch.Tensor) -> torch.Tensor:
        """On the GPU; nothing waits for it where the states are those of the call before, as in a sampling loop."""
        import torch

        if self._seen is None or not self._seen.is_of(states):
            assert self.texts is not None, "the caller looked"
            given = states.detach().cpu().float().numpy().astype(self.texts.spec.dtype)
            projections = torch.from_numpy(self.texts.of(given)).to(states.device)
            if states.is_inference():
                return projections
            self._seen = _SeenText(states, states._version, projections)
        return self._seen.projections

    def close(self) -> None:
        """Closes the engine."""
        self._seen = None
        super().close()

    @cached_property
    def _table(self) -> torch.Tensor | None:
        """The stored time projections of all rows, on the GPU where there is one."""
        import torch

        if not isinstance(self.features, StoredFeatures):
            return None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.from_numpy(self.features.table).to(device)
