"""Runs a session: from host arrays, or with inputs and outputs in buffers on its device, bound per set of shapes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.runner import ClosingRunner

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnxruntime
    import torch
    from numpy.typing import NDArray

_MOST_BINDINGS = 8
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntimeRunner(ClosingRunner):
    """Runner of an open session on the host."""

    def __init__(self, session: onnxruntime.InferenceSession, bound: Mapping[str, NDArray[Any]]) -> None:
        self._session: onnxruntime.InferenceSession | None = session
        self._bound = {name: np.ascontiguousarray(value) for name, value in bound.items()}  # passed without a copy
        self._outputs = [output.name for output in session.get_outputs()]

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns all outputs of the graph."""
        if self._session is None:
            raise ValueError("the runner is closed")
        values = self._session.run(self._outputs, {**inputs, **self._bound})
        return dict(zip(self._outputs, values, strict=True))

    def rebind(self, name: str, value: NDArray[Any]) -> None:
        """Gives a bound input other values."""
        self._bound[name] = np.ascontiguousarray(value)

    def close(self) -> None:
        """Drops the session."""
        self._session = None


@dataclass(frozen=True)
class _Binding:
    """Buffers by name, bound; ``run_options`` keep the CUDA graphs of different shapes apart."""

    bound: onnxruntime.IOBinding
    inputs: dict[str, onnxruntime.OrtValue]
    outputs: dict[str, onnxruntime.OrtValue]
    run_options: onnxruntime.RunOptions


class DeviceRunner(ClosingRunner):
    """Runner of an open session on a GPU, or on the CPU where ``gpu``, its index, is None.

    ``bound`` inputs are uploaded here and stay there. An output's size that is not fixed has a name, and is that of the
    inputs' size of this name.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, bound: Mapping[str, NDArray[Any]], gpu: int | None
    ) -> None:
        import onnxruntime

        self._session: onnxruntime.InferenceSession | None = session
        self._gpu = gpu
        self._place = ("cpu", 0) if gpu is None else ("cuda", gpu)
        self._bound = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), *self._place)
            for name, value in bound.items()
        }
        self._bindings: OrderedDict[tuple[object, ...], _Binding] = OrderedDict()
        self._made = 0

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns all outputs of the graph, copied to the host."""
        binding = self._binding({name: (value.shape, value.dtype) for name, value in inputs.items()})
        for name, value in inputs.items():
            binding.inputs[name].update_inplace(np.ascontiguousarray(value))
        self._run(binding)
        return {name: value.numpy() for name, value in binding.outputs.items()}

    def infer_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs tensors, of the graph's own types or any other floating-point ones; outputs stay on the device.

        They are valid until the next call. The call returns when the step is done.
        """
        import torch
        from torch.utils.dlpack import from_dlpack

        binding = self._binding({n: (tuple(v.shape), self._input_type(n)) for n, v in inputs.items()})
        for name, value in inputs.items():
            from_dlpack(binding.inputs[name]).copy_(value)
        if self._gpu is not None:
            torch.cuda.current_stream(self._gpu).synchronize()  # ONNX Runtime has a stream of its own
        self._run(binding)
        return {name: from_dlpack(value) for name, value in binding.outputs.items()}

    def rebind(self, name: str, value: NDArray[Any]) -> None:
        """Gives a bound input other values, where they are."""
        self._bound[name].update_inplace(np.ascontiguousarray(value))

    def close(self) -> None:
        """Drops the buffers and the session."""
        self._bindings.clear()
        self._bound = {}
        self._session = None

    def _run(self, binding: _Binding) -> None:
        if self._session is None:
            raise ValueError("the runner is closed")
        self._session.run_with_iobinding(binding.bound, binding.run_options)

    def _input_type(self, name: str) -> np.dtype[Any]:
        kinds = {item.name: item.type for item in self._opened().get_inputs()}
        return np.dtype(_TYPES.get(kinds[name], np.int64))

    def _opened(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise ValueError("the runner is closed")
        return self._session

    def _binding(self, inputs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> _Binding:
        key = tuple(sorted((name, shape) for name, (shape, _) in inputs.items()))
        if key not in self._bindings:
            if len(self._bindings) == _MOST_BINDINGS:
                self._bindings.popitem(last=False)
            self._bindings[key] = self._new_binding(inputs)
        self._bindings.move_to_end(key)
        return self._bindings[key]

    def _new_binding(self, inputs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> _Binding:
        import onnxruntime

        session = self._opened()
        given = [(item.shape, inputs[item.name][0]) for item in session.get_inputs() if item.name in inputs]
        sizes = dict(pair for names, shape in given for pair in zip(names, shape, strict=True))
        outputs = {
            item.name: ([sizes.get(size, size) for size in item.shape], _TYPES[item.type])
            for item in session.get_outputs()
        }
        buffer = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        ins = {name: buffer(list(shape), kind.type, *self._place) for name, (shape, kind) in inputs.items()}
        outs = {name: buffer(shape, kind, *self._place) for name, (shape, kind) in outputs.items()}
        bound = session.io_binding()
        for name, value in (ins | self._bound).items():
            bound.bind_ortvalue_input(name, value)
        for name, value in outs.items():
            bound.bind_ortvalue_output(name, value)
        self._made += 1
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self._made))
        return _Binding(bound, ins, outs, options)
