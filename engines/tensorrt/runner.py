"""Runs a TensorRT engine: device buffers are allocated and bound once, at the profile's largest batch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.runner import ClosingRunner
from s2p_deploy.errors import InputError, MissingEnvironmentError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from numpy.typing import NDArray


class TensorRtRunner(ClosingRunner):
    """An execution context on the current CUDA device. ``bound`` inputs are uploaded here and stay on the device."""

    def __init__(self, library: str, plan: bytes, bound: Mapping[str, NDArray[Any]]) -> None:
        import torch

        trt = importlib.import_module(library)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise MissingEnvironmentError(
                f"{library} cannot open this engine on {torch.cuda.get_device_name()}: build it for this GPU"
            )
        self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = {n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
        largest = {n: tuple(self._engine.get_tensor_profile_shape(n, 0)[2]) for n in inputs}
        for name, shape in largest.items():
            self._context.set_input_shape(name, shape)
        self._outputs = [name for name in names if name not in inputs]
        largest |= {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}
        self._buffers = {
            name: torch.empty(shape, dtype=_torch_type(trt.nptype(self._engine.get_tensor_dtype(name))), device="cuda")
            for name, shape in largest.items()
        }
        for name, buffer in self._buffers.items():
            self._context.set_tensor_address(name, buffer.data_ptr())
        for name, value in bound.items():
            self._buffers[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))
        torch.cuda.synchronize()

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs, copied to the host."""
        import torch

        outputs = self.infer_tensors({name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}

    def infer_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same for tensors on any device; the results are on the GPU and valid until the next call.

        Raises:
            InputError: a batch is larger than the engine's profile allows.
        """
        import torch

        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(torch.cuda.default_stream())
            for name, value in inputs.items():
                self._upload(name, value)
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise InputError("TensorRT refused these inputs: see its log")
        self._stream.synchronize()
        # a batch below the largest fills the front of each buffer
        return {n: self._front(n, tuple(self._context.get_tensor_shape(n))) for n in self._outputs}

    def close(self) -> None:
        """Frees the context, the engine and the buffers."""
        self._context = self._engine = self._runtime = None
        self._buffers = {}

    def _upload(self, name: str, value: torch.Tensor) -> None:
        if value.dim() and value.shape[0] > self._buffers[name].shape[0]:
            raise InputError(
                f"batch {value.shape[0]} is above this engine's {self._buffers[name].shape[0]}: "
                "build with a larger profile"
            )
        if not self._context.set_input_shape(name, tuple(value.shape)):
            raise InputError(f"input {name} has shape {list(value.shape)}, which is outside the engine's profile")
        self._front(name, tuple(value.shape)).copy_(value, non_blocking=True)

    def _front(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._buffers[name].flatten()[: int(np.prod(shape))].view(shape)


def _torch_type(numpy_type: type[Any]) -> torch.dtype:
    import torch

    return torch.from_numpy(np.empty(0, numpy_type)).dtype
