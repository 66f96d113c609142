"""A runner whose engine is another model of the same Triton server, asked from inside its Python backend (BLS)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from s2p_deploy.engines.bound_scales import BOUND
from s2p_deploy.engines.runner import OUTPUT, ClosingRunner
from s2p_deploy.errors import S2PError
from s2p_deploy.serve.request import GivenUpError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from numpy.typing import NDArray

    from s2p_deploy.engines.runner import Runner

STEP_INDEX = "step_index"


class DenoiserError(S2PError):
    """The denoiser's model gave an error in the place of an answer."""


class BlsRunner(ClosingRunner):
    """Sends every call to the model ``denoiser``.

    ``backend`` is Triton's own module, which only exists inside its Python backend. With ``batched``, the model's
    batch axis is Triton's. ``is_cancelled`` is asked before every call.
    """

    def __init__(
        self, backend: ModuleType, denoiser: str, is_cancelled: Callable[[], bool], *, batched: bool = True
    ) -> None:
        self._backend, self._denoiser = backend, denoiser
        self._is_cancelled, self._batched = is_cancelled, batched

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """``noise_pred`` [batch, C, H, W] of the other model, in memory of its own.

        Raises:
            GivenUpError: whoever asked has left. DenoiserError: the other model gave an error.
        """
        if self._is_cancelled():
            raise GivenUpError("whoever asked has left")
        given = dict(inputs)
        if self._batched:
            given[STEP_INDEX] = given[STEP_INDEX][:, None]
        request = self._backend.InferenceRequest(
            model_name=self._denoiser,
            requested_output_names=[OUTPUT],
            inputs=[tensor_of(self._backend, name, value) for name, value in given.items()],
        )
        response = request.exec()
        if response.has_error():
            raise DenoiserError(f"{self._denoiser}: {response.error().message()}")
        return {OUTPUT: array_of(self._backend.get_output_tensor_by_name(response, OUTPUT))}

    def close(self) -> None:
        """Nothing to free: the engine belongs to the other model."""


class TableRunner(ClosingRunner):
    """Gives a runner the scale table with every call: Triton keeps no state between the calls of a model.

    Where the engine leaves the number of its rows open (``fixed`` is False), only the rows of the call go along, and
    ``step_index`` counts them: 4 bytes for each sample and act point. Otherwise the whole table does: for 1000 rows and
    59 act points that is 236 kB a step.
    """

    def __init__(self, runner: Runner, scales: NDArray[np.float32], *, fixed: bool) -> None:
        self._runner, self._scales, self._fixed = runner, np.ascontiguousarray(scales), fixed

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What the runner gives."""
        if self._fixed:
            return self._runner.infer({**inputs, BOUND: self._scales})
        rows = inputs[STEP_INDEX]
        own = np.arange(len(rows), dtype=rows.dtype)
        return self._runner.infer({**inputs, STEP_INDEX: own, BOUND: self._scales[rows]})

    def close(self) -> None:
        """Closes the runner."""
        self._runner.close()


def tensor_of(backend: ModuleType, name: str, value: NDArray[Any]) -> Any:  # noqa: ANN401 - Triton's own type
    """An array as Triton's tensor.

    Handed over by DLPack: a backend that was compiled before NumPy 2 takes arrays of NumPy 2 for empty ones.
    """
    return backend.Tensor.from_dlpack(name, torch.from_numpy(np.require(value, requirements=["C", "W"])))


def array_of(tensor: Any) -> NDArray[Any]:  # noqa: ANN401 - Triton's own type
    """Triton's tensor, wherever it lies, as an array with memory of its own. By DLPack, as :func:`tensor_of`."""
    return np.array(from_dlpack(tensor).cpu().numpy())
