"""The child process of a model that OpenVINO reads by itself, such as NNCF's IR: see full_size/engines.py.

A request names the ``model``, its ``precision``, ``batch`` and, where height and width are open, the ``latents``' side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino

from s2p_deploy.bench.worker import serve_workload
from s2p_deploy.engines.openvino.backend import OpenVinoRunner
from s2p_deploy.records import Execution


class IrWorkload:
    """A model compiled with the same properties as an engine, and with none of an engine's passes."""

    def __init__(self, request: dict[str, Any]) -> None:
        model = openvino.Core().read_model(request["model"])
        model.reshape({port.get_any_name(): _fixed(port.get_partial_shape(), request) for port in model.inputs})
        self._shapes = {
            port.get_any_name(): (tuple(port.shape), np.dtype(port.get_element_type().to_dtype()))
            for port in model.inputs
        }
        self._runner = OpenVinoRunner(model, Execution(request["precision"]), {})

    def step(self, number: int) -> None:
        """Standard normal values, and timesteps below 1000 where an input is of integers."""
        random = np.random.default_rng(number)
        inputs = {}
        for name, (shape, kind) in self._shapes.items():
            whole = kind.kind == "i"
            values = random.integers(1000, size=shape) if whole else random.standard_normal(shape)
            inputs[name] = values.astype(kind)
        self._runner.infer(inputs)

    def open_pipeline(self) -> None:
        """Nothing is drawn with it."""
        raise NotImplementedError

    def draw(self, number: int) -> None:
        """Nothing is drawn with it."""
        raise NotImplementedError


def _fixed(shape: Any, request: dict[str, Any]) -> list[int]:  # noqa: ANN401 - openvino is not typed
    """The first axis that is open is the batch, others are the latents' sides."""
    free = iter((request["batch"], request.get("latents", 0), request.get("latents", 0)))
    return [size.get_length() if size.is_static else next(free) for size in shape]


if __name__ == "__main__":
    serve_workload(IrWorkload)
