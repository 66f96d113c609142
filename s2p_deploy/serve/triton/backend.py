"""The border to Triton's Python backend: a model's settings, its tensors and errors, and what the denoiser takes.

Imported inside tritonserver, whose Python has s2p-deploy without its extras.
"""

from __future__ import annotations

import json
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from s2p_deploy.engines.runner import ADDED_COND, BOUND, PROJECTIONS, TEXT, TEXT_PROJECTIONS
from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.records import TensorSpec
from s2p_deploy.records.optional_inputs import is_optional
from s2p_deploy.serve.request import CancelledRequestError
from s2p_deploy.signing import open_engine

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from numpy.typing import NDArray

    from s2p_deploy.records import Engine

TIMESTEP_INDEX = "timestep_index"
ENGINE, PIPELINE = "engine", "pipeline"  # folders beside model.py


@dataclass(frozen=True)
class ModelSettings:
    """A model version's folder, its instance's device (``cpu``, ``cuda:0``), and the parameters of ``config.pbtxt``."""

    folder: Path
    device: str
    parameters: Mapping[str, str]

    @staticmethod
    def of(args: Mapping[str, str]) -> ModelSettings:
        """Reads what Triton gives to a model's ``initialize``."""
        config: dict[str, Any] = json.loads(args["model_config"])
        on_gpu = args["model_instance_kind"] == "GPU"
        return ModelSettings(
            Path(args["model_repository"]) / args["model_version"],
            f"cuda:{int(args['model_instance_device_id'])}" if on_gpu else "cpu",
            {name: value["string_value"] for name, value in config.get("parameters", {}).items()},
        )

    @property
    def schedules(self) -> tuple[NDArray[np.float64], ...]:
        """Timesteps to bind, float64 [calls] each."""
        return tuple(np.asarray(schedule, dtype=np.float64) for schedule in self.value("schedules"))

    def value(self, name: str) -> Any:  # noqa: ANN401 - JSON
        """Parses a parameter that is JSON. Raises InputError where it is missing or none."""
        try:
            return json.loads(self.parameters[name])
        except (KeyError, ValueError) as error:
            raise InputError(f"parameter {name} of config.pbtxt is missing or no JSON: export it again") from error

    def open_engine(self) -> Engine:
        """Opens and verifies the engine's artifact; its signature too, where ``S2P_PUBLIC_KEY`` names a key.

        Raises:
            IntegrityError: it was changed, or is not signed with that key.
        """
        key = os.environ.get("S2P_PUBLIC_KEY")
        return open_engine(self.folder / ENGINE, Path(key) if key else None)


def remote_inputs(engine: Engine) -> tuple[TensorSpec, ...]:
    """Lists what the denoiser's Python model takes per step: what PyTorch's denoiser would, every float as float32.

    Inputs of adapters are not among it: its runner fills them with zeros.
    """
    replaced = {PROJECTIONS, TEXT_PROJECTIONS, TEXT, BOUND}
    needed = [s for s in engine.inputs if s.name not in replaced and not is_optional(s.name)]
    own = [TensorSpec(s.name, _plain(s.dtype), s.shape) for s in needed]
    text = TensorSpec(TEXT, "float32", ("batch", *_text_shape(engine)))
    added = [TensorSpec(ADDED_COND, "float32", ("batch", engine.added_width))] if engine.added_width else []
    return (*own, text, *added)


def takes_table(engine: Engine) -> bool:
    """Returns whether the scale table is an input of the engine's file; without activation quantizers it is not."""
    return bool(engine.scales.quantizers) and any(spec.name == BOUND for spec in engine.inputs)


def tensor_of(backend: ModuleType, name: str, value: NDArray[Any]) -> Any:  # noqa: ANN401 - Triton's own type
    """Wraps an array as Triton's tensor.

    By DLPack: a backend that was compiled before NumPy 2 takes arrays of NumPy 2 for empty ones.
    """
    return backend.Tensor.from_dlpack(name, torch.from_numpy(np.require(value, requirements=["C", "W"])))


def array_of(tensor: Any) -> NDArray[Any]:  # noqa: ANN401 - Triton's own type
    """Copies Triton's tensor, on whatever device it is, to an array. By DLPack, as :func:`tensor_of`."""
    return np.array(from_dlpack(tensor).cpu().numpy())


def error_response(backend: ModuleType, error: Exception) -> Any:  # noqa: ANN401 - Triton's own type
    """Makes the response to a request that failed.

    A client is told what was wrong with its request; what was wrong with the server is in the server's log alone.
    """
    kinds = backend.TritonError
    match error:
        case InputError():
            failure = kinds(str(error), kinds.INVALID_ARG)
        case CancelledRequestError():
            failure = kinds(str(error), kinds.CANCELLED)
        case S2PError():
            backend.Logger.log_error(str(error))
            failure = kinds("the picture cannot be drawn: the server's log says why", kinds.INTERNAL)
        case _:
            backend.Logger.log_error("".join(traceback.format_exception(error)))
            failure = kinds("internal error: the server's log says more", kinds.INTERNAL)
    return backend.InferenceResponse(error=failure)


def _text_shape(engine: Engine) -> tuple[int, int]:
    """Returns tokens and width of the text states.

    -1 for tokens of which there may be several numbers, and a width that only the graph of the text's products knows.
    """
    spec = next(spec for spec in engine.inputs if spec.name in {TEXT, TEXT_PROJECTIONS})
    tokens, width = (size if isinstance(size, int) else -1 for size in spec.shape[1:])
    return tokens, width if spec.name == TEXT else -1


def _plain(dtype: str) -> str:
    return "float32" if dtype.startswith("float") else dtype
