"""The child process of an OpenVINO IR that is no engine of this package, such as NNCF's: see full_size_engines.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino

from s2p_deploy.bench.workload import serve_workload
from s2p_deploy.engines.openvino.backend import OpenVinoRunner


class IrWorkload:
    """An IR of fixed shapes, compiled with the same properties as an engine."""

    def __init__(self, xml: Path, hint: str, batch: int) -> None:
        model = openvino.Core().read_model(xml)
        self._shapes = {
            port.get_any_name(): (tuple(port.shape), np.dtype(port.get_element_type().to_dtype()))
            for port in model.inputs
        }
        self._runner = OpenVinoRunner(model, hint, {}, batch)

    def step(self, number: int) -> None:
        """Standard normal values, and timesteps below 1000 where an input is of integers."""
        random = np.random.default_rng(number)
        inputs = {}
        for name, (shape, kind) in self._shapes.items():
            whole = kind.kind == "i"
            inputs[name] = random.integers(1000, size=shape) if whole else random.standard_normal(shape, kind.type)
        self._runner.infer(inputs)

    def open_pipeline(self) -> None:
        """Nothing is drawn with it."""
        raise NotImplementedError

    def draw(self, number: int) -> None:
        """Nothing is drawn with it."""
        raise NotImplementedError


def _opened(request: dict[str, Any]) -> IrWorkload:
    return IrWorkload(Path(request["xml"]), request["hint"], request["batch"])


if __name__ == "__main__":
    serve_workload(_opened)
