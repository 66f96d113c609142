"""Launchers of a plan's step: captured as a CUDA graph, one per set of input shapes, by us or by TensorRT-RTX.

Both kinds read and write buffers at fixed addresses, which their owner fills and keeps alive.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from filelock import FileLock

from s2p_deploy.engines.machine import plain_name, private_folder
from s2p_deploy.errors import EngineBuildError, InputError, MissingEnvironmentError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import tensorrt_rtx as trt
    import torch

    from s2p_deploy.engines.options import Shape
    from s2p_deploy.engines.tensorrt.plan import OpenPlan

LARGEST_RUNTIME_CACHE = 100 * 2**20  # bytes; larger ones load slowly, says NVIDIA
_MOST_STEPS = 8  # sets of shapes that are kept; each holds a context and a graph


class Launcher(Protocol):
    """Runs the step on one stream."""

    def run(self, shapes: Mapping[str, Shape]) -> None:
        """Enqueues one step at the given input shapes. Raises InputError where the library refuses it."""

    def close(self) -> None:
        """Frees contexts and graphs, what they compute in, and the engine."""


@dataclass
class _Step:
    """Execution context with its shapes set. It must run once before it is captured, says TensorRT."""

    context: trt.IExecutionContext
    graph: torch.cuda.CUDAGraph | None = None
    ran: bool = False
    capturable: bool = True


class ContextMemory:
    """Memory that a plan's execution contexts compute in, one at a time: as much as the shapes run so far have needed.

    So a profile's largest shapes cost nothing before they run. Contexts have to be made with the allocation strategy
    ``USER_MANAGED``.
    """

    def __init__(self, plan: OpenPlan) -> None:
        self._device = plan.device
        self._memory: torch.Tensor | None = None

    def holds(self, context: trt.IExecutionContext) -> bool:
        """Gives a context, whose input shapes are set, this memory; False where it needs more than there is."""
        needed = int(context.update_device_memory_size_for_shapes())
        if self._memory is None or self._memory.numel() < needed:
            return False
        context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        return True

    def grow(self, context: trt.IExecutionContext) -> None:
        """Takes as much as a context needs, and gives it that; nothing may use the former memory any more.

        Raises:
            MissingEnvironmentError: the GPU has not so much.
        """
        import torch

        needed = max(int(context.update_device_memory_size_for_shapes()), 1)
        self._memory = None
        try:
            self._memory = torch.empty(needed, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise MissingEnvironmentError(
                f"a step of this size needs {needed / 2**30:.2f} GiB of memory on {self._device}, which are not free: "
                "end what else uses the GPU, or run smaller batches"
            ) from error
        context.set_device_memory(self._memory.data_ptr(), needed)

    def free(self) -> None:
        """Frees it."""
        self._memory = None


class GraphLauncher:
    """TensorRT: one context per set of shapes; the second run of each is captured, and replayed from then on.

    A graph belongs to the state of its context, so contexts are not shared between shapes; their memory is, since one
    runs at a time. ``capture=False`` never captures.
    """

    def __init__(
        self, plan: OpenPlan, addresses: Mapping[str, int], stream: torch.cuda.Stream, *, capture: bool = True
    ) -> None:
        self._plan: OpenPlan | None = plan
        self._addresses = addresses
        self._stream = stream
        self._capture = capture
        self._memory = ContextMemory(plan)
        self._steps: OrderedDict[tuple[tuple[str, Shape], ...], _Step] = OrderedDict()

    def run(self, shapes: Mapping[str, Shape]) -> None:
        """Enqueues one step, or replays its graph."""
        step = self._step(shapes)
        if step.graph is None and step.ran and step.capturable and self._capture:
            step.graph = _captured(step.context, self._stream)
            step.capturable = step.graph is not None
        if step.graph is not None:
            step.graph.replay()
        else:
            _enqueue(step.context, self._stream)
        step.ran = True

    def close(self) -> None:
        """Frees contexts, graphs, their memory and the engine."""
        self._stream.synchronize()
        self._steps.clear()
        self._memory.free()
        self._plan = None

    def _step(self, shapes: Mapping[str, Shape]) -> _Step:
        key = tuple(sorted(shapes.items()))
        if key not in self._steps:
            if len(self._steps) == _MOST_STEPS:
                self._stream.synchronize()  # the oldest may still run
                self._steps.popitem(last=False)
            self._steps[key] = _Step(self._context(shapes))
        self._steps.move_to_end(key)
        return self._steps[key]

    def _context(self, shapes: Mapping[str, Shape]) -> trt.IExecutionContext:
        if self._plan is None:
            raise ValueError("the launcher is closed")
        strategy = self._plan.library.ExecutionContextAllocationStrategy.USER_MANAGED
        context = _made(self._plan.engine.create_execution_context(strategy), self._addresses, shapes)
        if not self._memory.holds(context):
            self._stream.synchronize()
            self._steps.clear()  # their graphs were captured in the memory that goes now
            self._memory.grow(context)
        return context


class ManagedLauncher:
    """TensorRT-RTX: one context, whose runtime captures graphs by itself, and keeps compiled kernels in ``cache``.

    ``capture=False`` asks it not to. Where its version has neither, the context simply runs.
    """

    def __init__(
        self,
        plan: OpenPlan,
        addresses: Mapping[str, int],
        stream: torch.cuda.Stream,
        cache: Path,
        *,
        capture: bool = True,
    ) -> None:
        self._plan: OpenPlan | None = plan
        self._addresses = addresses
        self._stream = stream
        self._cache_file = cache
        self._kept = b""
        self._config = plan.engine.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(
            plan.library.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        strategies = getattr(plan.library, "CudaGraphStrategy", None)
        if strategies is not None:
            self._config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if capture else strategies.DISABLED
        self._kernels = self._kernel_cache(self._config)
        self._memory = ContextMemory(plan)
        self._context: trt.IExecutionContext | None = None
        self._shapes: dict[str, Shape] = {}

    def run(self, shapes: Mapping[str, Shape]) -> None:
        """Enqueues one step; TensorRT-RTX replays what it has captured."""
        if self._context is None or shapes != self._shapes:
            self._context = self._context_for(shapes)
            self._shapes = dict(shapes)
        _enqueue(self._context, self._stream)

    def close(self) -> None:
        """Writes the compiled kernels to the cache, then frees the context, its memory and the engine."""
        if self._plan is None:
            return
        self._stream.synchronize()
        if self._kernels is not None:
            kernels = bytes(self._kernels.serialize())
            if kernels != self._kept and not write_locked(self._cache_file, kernels):
                logging.getLogger(__name__).warning("%d bytes of compiled kernels are too many to keep", len(kernels))
        self._memory.free()
        self._context = self._kernels = self._config = self._plan = None

    def _context_for(self, shapes: Mapping[str, Shape]) -> trt.IExecutionContext:
        if self._plan is None:
            raise ValueError("the launcher is closed")
        if self._context is not None:
            _set_shapes(self._context, shapes)
            if self._memory.holds(self._context):
                return self._context
        self._stream.synchronize()
        self._context = None  # the runtime captured its graphs in the memory that goes now
        context = _made(self._plan.engine.create_execution_context(self._config), self._addresses, shapes)
        if not self._memory.holds(context):
            self._memory.grow(context)
        return context

    def _kernel_cache(self, config: trt.IRuntimeConfig) -> trt.IRuntimeCache | None:
        if not hasattr(config, "create_runtime_cache"):
            return None
        cache = config.create_runtime_cache()
        kept = read_locked(self._cache_file)
        # the library refuses kernels of another GPU, driver or version by itself: then it compiles anew
        if kept is not None and cache.deserialize(kept):
            self._kept = kept
        config.set_runtime_cache(cache)
        return cache


def _made(
    context: trt.IExecutionContext | None, addresses: Mapping[str, int], shapes: Mapping[str, Shape]
) -> trt.IExecutionContext:
    """Binds the buffers of a new context and sets its shapes."""
    if context is None:
        raise EngineBuildError("TensorRT made no execution context: see its log")
    for name, address in addresses.items():
        context.set_tensor_address(name, address)
    _set_shapes(context, shapes)
    return context


def _set_shapes(context: trt.IExecutionContext, shapes: Mapping[str, Shape]) -> None:
    for name, shape in shapes.items():
        if not context.set_input_shape(name, shape):
            raise InputError(f"input {name} has shape {list(shape)}, which the engine refuses")


def _enqueue(context: trt.IExecutionContext, stream: torch.cuda.Stream) -> None:
    if not context.execute_async_v3(stream.cuda_stream):
        raise InputError("TensorRT refused these inputs: see its log")


def _captured(context: trt.IExecutionContext, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
    """Captures the step as a CUDA graph, not run; None where the engine cannot be captured: it then runs as it is."""
    import torch

    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: what other threads do on the GPU meanwhile must not spoil the capture
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            accepted = context.execute_async_v3(stream.cuda_stream)
    except RuntimeError as error:
        logging.getLogger(__name__).warning("the engine runs without a CUDA graph: %s", str(error).partition("\n")[0])
        return None
    return graph if accepted else None


def timing_cache(version: str, device: str, capability: tuple[int, int]) -> Path:
    """Names the file of timings of one TensorRT version on one kind of GPU. It need not exist."""
    return private_folder("tensorrt") / (
        plain_name("timings", version, device, "sm{}{}".format(*capability)) + ".cache"
    )


def runtime_cache(version: str, capability: tuple[int, int], plan_digest: str) -> Path:
    """Names the file of compiled kernels of one plan (SHA-256 of its bytes) for one TensorRT-RTX and GPU generation."""
    return private_folder("tensorrt_rtx") / (
        plain_name("kernels", version, "sm{}{}".format(*capability), plan_digest) + ".bin"
    )


def read_locked(path: Path) -> bytes | None:
    """Returns the bytes of a cache file while nobody writes it; None where there is none or it is too large."""
    with FileLock(f"{path}.lock"):
        if not path.is_file() or path.stat().st_size > LARGEST_RUNTIME_CACHE:
            return None
        return path.read_bytes()


def write_locked(path: Path, data: bytes) -> bool:
    """Writes a cache file in one piece while nobody reads it; False, and nothing written, where it is too large."""
    if len(data) > LARGEST_RUNTIME_CACHE:
        return False
    with FileLock(f"{path}.lock"):
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(data)
        temporary.replace(path)
    return True
