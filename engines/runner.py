"""Runners: one call for PyTorch, ONNX Runtime, OpenVINO and TensorRT, so that every comparison is one function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    import torch
    from numpy.typing import NDArray

    from s2p_deploy.records import TensorSpec, TimestepTable

OUTPUT = "noise_pred"
PROJECTIONS = "time_projections"


class Runner(Protocol):
    """Something that computes outputs from inputs. A context manager; closed, it holds no memory."""

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name; the arrays belong to the caller."""

    def close(self) -> None:
        """Frees what the runner holds. May be called twice."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ClosingRunner:
    """The context manager of a runner: leaving it closes."""

    def close(self) -> None:
        """Frees what the runner holds."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TorchRunner(ClosingRunner):
    """A PyTorch denoiser, floating point or fake-quant.

    It is called with ``sample`` [batch, C, H, W], ``step_index`` int64 [batch] and ``encoder_hidden_states`` [batch,
    tokens, D]. Floating-point inputs are cast to ``dtype`` (None: float32).
    """

    def __init__(self, module: Callable[..., torch.Tensor], dtype: torch.dtype | None = None) -> None:
        import torch

        self._module = module
        self._dtype = dtype or torch.float32

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """``noise_pred`` as NumPy (float32 for types that NumPy lacks)."""
        import torch

        sample = torch.from_numpy(np.ascontiguousarray(inputs["sample"])).to(self._dtype)
        rows = torch.from_numpy(np.ascontiguousarray(inputs["step_index"], dtype=np.int64))
        text = torch.from_numpy(np.ascontiguousarray(inputs["encoder_hidden_states"])).to(self._dtype)
        with torch.no_grad():
            output = self._module(sample, rows, text)
        if output.dtype == torch.bfloat16:
            output = output.float()
        return {OUTPUT: output.numpy()}

    def close(self) -> None:
        """Nothing to free: the module belongs to the caller."""


class BoundRunner(ClosingRunner):
    """An engine with its scales bound: what pipelines and comparisons call, with the same three inputs as PyTorch.

    Values are cast to what the engine's inputs ask for. ``timesteps`` says which timestep every row is;
    ``time_projections`` [rows, P] are their projected time features, where the engine takes those as an input.
    """

    def __init__(
        self,
        runner: Runner,
        inputs: tuple[TensorSpec, ...],
        timesteps: TimestepTable,
        time_projections: NDArray[np.floating[Any]] | None = None,
    ) -> None:
        self.timesteps = timesteps
        self._runner = runner
        self._inputs = tuple(spec for spec in inputs if spec.name != PROJECTIONS)
        self._time_projections = time_projections

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """``noise_pred`` [batch, C, H, W].

        Raises:
            InputError: an input is missing, has another shape than the engine's, or a row is outside the scale table.
        """
        self._check(inputs)
        given = {spec.name: np.ascontiguousarray(inputs[spec.name], dtype=spec.dtype) for spec in self._inputs}
        if self._time_projections is not None:
            given[PROJECTIONS] = self._time_projections[given["step_index"]]
        return self._runner.infer(given)

    def __call__(
        self, sample: NDArray[Any], step_index: NDArray[np.int64], encoder_hidden_states: NDArray[Any]
    ) -> NDArray[Any]:
        """One step: ``sample`` [batch, C, H, W], rows [batch], text [batch, tokens, D] -> ``noise_pred``."""
        inputs = {"sample": sample, "step_index": step_index, "encoder_hidden_states": encoder_hidden_states}
        return self.infer(inputs)[OUTPUT]

    def close(self) -> None:
        """Closes the engine."""
        self._runner.close()

    def _check(self, inputs: Mapping[str, NDArray[Any]] | Mapping[str, torch.Tensor]) -> None:
        unknown = set(inputs) - {spec.name for spec in self._inputs}
        if unknown:
            raise InputError(f"the engine has no input {sorted(unknown)[0]!r} to give per step")
        batch = len(inputs["step_index"]) if "step_index" in inputs else 0
        for spec in self._inputs:
            if spec.name not in inputs:
                raise InputError(f"the engine needs an input {spec.name!r}")
            shape = np.shape(inputs[spec.name])  # a tensor has one too
            wanted = tuple(batch if isinstance(size, str) else size for size in spec.shape)
            if shape != wanted:
                raise InputError(f"input {spec.name} has shape {list(shape)}, the engine takes {list(wanted)}")
        rows, index = self.timesteps.rows, np.asarray(inputs["step_index"])
        if ((index < 0) | (index >= rows)).any():
            raise InputError(f"a step_index is outside the scale table's rows 0 to {rows - 1}")
