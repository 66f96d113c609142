"""The denoiser's model inside Triton's Python backend: one call of the engine for the steps of several requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines import load_engine
from s2p_deploy.engines.runner import OUTPUT
from s2p_deploy.errors import S2PError
from s2p_deploy.serve.triton.backend import (
    TIMESTEP_INDEX,
    ModelSettings,
    array_of,
    error_response,
    remote_inputs,
    tensor_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType

    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]
    Infer = Callable[[Arrays], dict[str, NDArray[Any]]]


class DenoiserModel:
    """An open engine. ``backend`` is Triton's module, ``args`` what it gives to ``initialize``.

    Raises:
        IntegrityError, MissingEnvironmentError, InputError: as :func:`s2p_deploy.engines.load_engine`.
    """

    def __init__(self, backend: ModuleType, args: Mapping[str, str]) -> None:
        settings = ModelSettings.of(args)
        if settings.device != "cpu":
            import torch

            torch.cuda.set_device(settings.device)
        engine = settings.open_engine()
        self._backend = backend
        self._names = [spec.name for spec in remote_inputs(engine)]
        self._padded = int(settings.parameters["padded_batch"])
        self._runner = load_engine(engine, schedules=settings.schedules, device=settings.device)
        if self._padded:
            self._runner.tune(self._padded)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Returns one response for each request that Triton's batcher brought together, in their order."""
        calls = [
            {name: array_of(self._backend.get_input_tensor_by_name(request, name)) for name in self._names}
            for request in requests
        ]
        return [self._response(prediction) for prediction in predictions(self._runner.infer, calls, self._padded)]

    def close(self) -> None:
        """Closes the engine."""
        self._runner.close()

    def _response(self, prediction: NDArray[Any] | Exception) -> Any:  # noqa: ANN401 - Triton's own type
        if isinstance(prediction, Exception):
            return error_response(self._backend, prediction)
        return self._backend.InferenceResponse([tensor_of(self._backend, OUTPUT, prediction.astype(np.float32))])


def predictions(infer: Infer, calls: Sequence[Arrays], padded: int = 0) -> list[NDArray[Any] | Exception]:
    """Runs several calls as one batch and returns the noise prediction of each.

    Samples that are missing to ``padded`` repeat the first one: at equal batch size no sample's bits depend on others.
    Where the batch fails, each call runs alone: what is wrong with one must not cost the others their results.
    """
    try:
        ends = np.cumsum([len(call[TIMESTEP_INDEX]) for call in calls])
        missing = max(0, padded - int(ends[-1]))
        joined = {n: np.concatenate([*(call[n] for call in calls), *[calls[0][n][:1]] * missing]) for n in calls[0]}
        split: list[NDArray[Any] | Exception] = [*np.split(infer(joined)[OUTPUT], ends)]
        return split[: len(calls)]
    except S2PError as error:
        if len(calls) == 1:
            return [error]
        return [prediction for call in calls for prediction in predictions(infer, [call], padded)]
