"""Runs a TensorRT engine: buffers on its GPU are allocated and bound once, at the profile's largest sizes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.runner import ClosingRunner
from s2p_deploy.engines.tensorrt.launchers import GraphLauncher, Launcher, ManagedLauncher, runtime_cache
from s2p_deploy.engines.tensorrt.plan import plan_memory
from s2p_deploy.errors import EngineBuildError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from numpy.typing import NDArray

    from s2p_deploy.engines.options import Shape
    from s2p_deploy.engines.tensorrt.plan import OpenPlan


class TensorRtRunner(ClosingRunner):
    """Runner of a plan on the GPU that it was opened on, with a stream of its own.

    ``bound`` inputs are uploaded here and stay on the device; those that the plan does not read are left out.
    ``capture=False`` runs every step without a CUDA graph.
    """

    def __init__(self, plan: OpenPlan, bound: Mapping[str, NDArray[Any]], *, capture: bool = True) -> None:
        import torch

        self._plan: OpenPlan | None = plan
        self._device = plan.device
        inputs, self._outputs = _names(plan)
        self._profile = {name: _profile(plan, name) for name in inputs}
        with torch.cuda.device(self._device):  # TensorRT works on the current one
            self._stream = torch.cuda.Stream(self._device)
            self._output_shapes: OutputShapes | None = OutputShapes(plan, self._outputs)
            highest = {name: high for name, (_, high) in self._profile.items()}
            self._buffers = _buffers(plan, highest | self._output_shapes.at(highest))
            self._bound = {name: value.shape for name, value in bound.items() if name in inputs}
            for name, shape in self._bound.items():
                check_shape(name, shape, *self._profile[name])
                self._front(name, shape).copy_(torch.from_numpy(np.ascontiguousarray(bound[name])))
            torch.cuda.synchronize(self._device)
            addresses = {name: buffer.data_ptr() for name, buffer in self._buffers.items()}
            self._launcher: Launcher | None = _launcher(plan, addresses, self._stream, capture=capture)
        logging.getLogger(__name__).info("memory on %s: %s", self._device, plan_memory(plan.library, plan.engine))

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns all outputs, copied to the host.

        Raises:
            InputError: an input's shape is outside the engine's profile.
        """
        import torch

        outputs = self.infer_tensors({name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}

    def infer_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs tensors on any device, in any floating-point type.

        The results are on the engine's GPU, ordered on PyTorch's current stream there, and valid until the next call;
        nothing here waits for the GPU.

        Raises:
            InputError: an input's shape is outside the engine's profile.
        """
        import torch

        if self._output_shapes is None or self._launcher is None:
            raise ValueError("the runner is closed")
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        for name, shape in shapes.items():
            check_shape(name, shape, *self._profile[name])
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for name, value in inputs.items():
                self._front(name, shapes[name]).copy_(value, non_blocking=True)
            self._launcher.run(shapes | self._bound)
        caller.wait_stream(self._stream)
        # what is below the largest size fills the front of each buffer
        return {name: self._front(name, shape) for name, shape in self._output_shapes.at(shapes | self._bound).items()}

    def rebind(self, name: str, value: NDArray[Any]) -> None:
        """Gives a bound input other values, behind the runs that are under way; the plan may not read it."""
        import torch

        if name not in self._bound:
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # not in the background: the caller writes to the same memory again
            self._front(name, self._bound[name]).copy_(torch.from_numpy(np.ascontiguousarray(value)))

    def close(self) -> None:
        """Frees contexts, graphs, the engine and the buffers."""
        if self._launcher is None:
            return
        self._launcher.close()
        # with any of them alive, runtime and engine keep the GPU's memory
        self._launcher = self._plan = self._output_shapes = None
        self._buffers = {}

    def _front(self, name: str, shape: Shape) -> torch.Tensor:
        return self._buffers[name].flatten()[: int(np.prod(shape))].view(shape)


def check_shape(name: str, shape: Shape, low: Shape, high: Shape) -> None:
    """Raises InputError where a shape is outside a profile's smallest and largest."""
    if shape and shape[0] > high[0] and shape[1:] == high[1:]:
        raise InputError(
            f"{name} has {shape[0]} in its first size, above this engine's {high[0]}: build with a larger profile"
        )
    if len(shape) != len(high) or not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
        raise InputError(f"input {name} has shape {list(shape)}, this engine takes {list(low)} to {list(high)}")


def _names(plan: OpenPlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Lists the names of the inputs and of the outputs."""
    engine = plan.engine
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = tuple(n for n in names if engine.get_tensor_mode(n) == plan.library.TensorIOMode.INPUT)
    return inputs, tuple(n for n in names if n not in inputs)


def _profile(plan: OpenPlan, name: str) -> tuple[Shape, Shape]:
    """Returns the smallest and largest shape of an input."""
    low, _, high = (tuple(shape) for shape in plan.engine.get_tensor_profile_shape(name, 0))
    return low, high


def _buffers(plan: OpenPlan, shapes: Mapping[str, Shape]) -> dict[str, torch.Tensor]:
    """Allocates every tensor at its largest."""
    import torch

    return {
        name: torch.zeros(shape, dtype=_torch_type(plan, name), device=plan.device) for name, shape in shapes.items()
    }


class OutputShapes:
    """The shapes of a plan's outputs at given shapes of all its inputs, inferred by a context that has no memory."""

    def __init__(self, plan: OpenPlan, outputs: tuple[str, ...]) -> None:
        self._context = plan.engine.create_execution_context(
            plan.library.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._context is None:
            raise EngineBuildError(f"{plan.library.__name__} made no execution context: see its log")
        self._outputs = outputs
        self._known: tuple[Mapping[str, Shape], dict[str, Shape]] = {}, {}

    def at(self, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
        """Returns the shape of every output; those of the last call are kept, as a sampling loop asks for the same."""
        if inputs != self._known[0]:
            for name, shape in inputs.items():
                self._context.set_input_shape(name, shape)
            self._known = dict(inputs), {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}
        return self._known[1]


def _torch_type(plan: OpenPlan, name: str) -> torch.dtype:
    import torch

    numpy_type = plan.library.nptype(plan.engine.get_tensor_dtype(name))
    return torch.from_numpy(np.empty(0, numpy_type)).dtype


def _launcher(plan: OpenPlan, addresses: Mapping[str, int], stream: torch.cuda.Stream, *, capture: bool) -> Launcher:
    import torch

    if plan.library.__name__ != "tensorrt_rtx":
        return GraphLauncher(plan, addresses, stream, capture=capture)
    # kept between processes: they spare the first run of a plan most of its compilation
    kernels = runtime_cache(plan.library.__version__, torch.cuda.get_device_capability(plan.device), plan.digest)
    return ManagedLauncher(plan, addresses, stream, kernels, capture=capture)
