"""The denoiser's model inside Triton's Python backend: one call of the engine for the steps of several requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines import load_engine
from s2p_deploy.engines.runner import OUTPUT
from s2p_deploy.errors import S2PError
from s2p_deploy.serve.triton.bls import STEP_INDEX, array_of, tensor_of
from s2p_deploy.serve.triton.model_config import remote_inputs
from s2p_deploy.serve.triton.responses import error_response
from s2p_deploy.serve.triton.settings import ModelSettings

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
        self._runner = load_engine(engine, schedules=settings.schedules)
        if self._padded:
            self._runner.tune(self._padded)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request that Triton's batcher brought together, in their order."""
        given = [
            {name: array_of(self._backend.get_input_tensor_by_name(request, name)) for name in self._names}
            for request in requests
        ]
        return [self._response(answer) for answer in answers(self._runner.infer, given, self._padded)]

    def close(self) -> None:
        """Closes the engine."""
        self._runner.close()

    def _response(self, answer: NDArray[Any] | Exception) -> Any:  # noqa: ANN401 - Triton's own type
        if isinstance(answer, Exception):
            return error_response(self._backend, answer)
        return self._backend.InferenceResponse([tensor_of(self._backend, OUTPUT, answer.astype(np.float32))])


def answers(infer: Infer, given: Sequence[Arrays], padded: int = 0) -> list[NDArray[Any] | Exception]:
    """What ``infer`` gives to each of several calls, asked for all of them at once.

    Samples that are missing to ``padded`` repeat the first one: at equal batch size no sample's bits depend on others.
    Where that fails, each is asked alone: what is wrong with one must not cost the others their answers.
    """
    try:
        ends = np.cumsum([len(one[STEP_INDEX]) for one in given])
        missing = max(0, padded - int(ends[-1]))
        joined = {n: np.concatenate([*(one[n] for one in given), *[given[0][n][:1]] * missing]) for n in given[0]}
        found: list[NDArray[Any] | Exception] = [*np.split(infer(joined)[OUTPUT], ends)]
        return found[: len(given)]
    except S2PError as error:
        if len(given) == 1:
            return [error]
        return [answer for one in given for answer in answers(infer, [one], padded)]
