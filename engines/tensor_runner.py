"""Runners whose inputs and outputs are tensors on the GPU: a sampling loop there moves no data through the host."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from s2p_deploy.engines.runner import PROJECTIONS, BoundRunner, Runner
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


class BoundTensorRunner(BoundRunner):
    """A bound engine whose runner takes tensors: what is bound is on the GPU, ``infer`` is as ever."""

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
        given = dict(inputs)
        if self._features is not None:
            given[PROJECTIONS] = self._features[inputs["step_index"].to(self._features.device, non_blocking=True)]
        return runner.infer_tensors(given)

    @cached_property
    def _features(self) -> torch.Tensor | None:
        """The time projections of all rows, on the GPU where there is one."""
        import torch

        if self._time_projections is None:
            return None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.from_numpy(self._time_projections).to(device)
