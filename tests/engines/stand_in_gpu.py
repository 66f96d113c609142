"""Two GPUs and a TensorRT that are not there: what is made records the GPU that it was made on.

PyTorch's calls to CUDA are replaced by ones that only note the current device; tensors are on the CPU. The library's
engine takes ``sample`` [batch, 4] and the bound ``act_scales`` [2, 3], its steps need 1,000 bytes per sample.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

CAPABILITIES = {0: (8, 6), 1: (8, 9)}
FREE = {0: 8 * 10**9, 1: 24 * 10**9}
BYTES_PER_SAMPLE = 1000
LARGEST = 32
_SHAPES = {"sample": ((1, 4), (2, 4), (LARGEST, 4)), "act_scales": ((2, 3),) * 3}


@dataclass
class StandInGpus:
    """The current device, and what was made on which: pairs of a kind and a device's index."""

    current: int = 0
    made: list[tuple[str, int]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    room: int = 10**9

    def note(self, kind: str) -> None:
        self.made.append((kind, self.current))

    @contextmanager
    def device(self, device: torch.device | int) -> Iterator[None]:
        before, self.current = self.current, index_of(device)
        yield
        self.current = before

    def set_device(self, device: torch.device | int) -> None:
        self.current = index_of(device)

    def tensor(self, shape: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:  # noqa: ANN401 - as torch
        self.made.append(("tensor", index_of(device)))
        size = int(np.prod(shape))
        if size > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if dtype == torch.uint8:
            self.sizes.append(size)
        return torch.as_tensor(np.zeros(shape, np.float32)).to(dtype)

    def stream(self, device: torch.device) -> SimpleNamespace:
        self.made.append(("stream", index_of(device)))
        return SimpleNamespace(
            cuda_stream=7, device=device, synchronize=lambda: None, wait_stream=lambda other: self.wait(other, device)
        )

    def wait(self, other: SimpleNamespace, device: torch.device) -> None:
        assert other.device.index == device.index, "streams of two GPUs"


def index_of(device: torch.device | int) -> int:
    index = device if isinstance(device, int) else device.index
    assert index is not None, "a device without an index"
    return index


def stand_in_gpus(patch: pytest.MonkeyPatch) -> StandInGpus:
    """Puts two GPUs into PyTorch until the test ends."""
    gpus = StandInGpus()
    calls: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: gpus.current,
        "set_device": gpus.set_device,
        "device": gpus.device,
        "get_device_capability": lambda device: CAPABILITIES[index_of(device)],
        "mem_get_info": lambda device: (FREE[index_of(device)], 80 * 10**9),
        "synchronize": index_of,
        "Stream": gpus.stream,
        "current_stream": gpus.stream,
        "stream": lambda stream: gpus.device(stream.device),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: gpus.note("replay")),
        "graph": lambda _graph, stream, capture_error_mode: gpus.device(stream.device),
    }
    for name, call in calls.items():
        patch.setattr(torch.cuda, name, call)
    patch.setattr(torch, "zeros", gpus.tensor)
    patch.setattr(torch, "empty", gpus.tensor)
    return gpus


class Context:
    """An execution context whose memory is the caller's: it refuses to run in less than its shapes need."""

    def __init__(self, gpus: StandInGpus, strategy: str) -> None:
        assert strategy == "user managed"
        self.gpus, self.batch, self.given = gpus, 0, 0
        gpus.note("context")

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name == "sample":
            self.batch = shape[0]
        return True

    def get_tensor_shape(self, _name: str) -> tuple[int, ...]:
        return (self.batch, 4)

    def update_device_memory_size_for_shapes(self) -> int:
        return BYTES_PER_SAMPLE * self.batch

    def set_device_memory(self, address: int, size: int) -> None:
        assert address
        self.given = size

    def execute_async_v3(self, _stream: int) -> bool:
        assert self.given >= BYTES_PER_SAMPLE * self.batch
        self.gpus.note("step")
        return True


class Engine:
    """A deserialized plan."""

    num_io_tensors = 3
    device_memory_size_v2 = BYTES_PER_SAMPLE * LARGEST

    def __init__(self, gpus: StandInGpus) -> None:
        self.gpus = gpus
        gpus.note("engine")

    def get_tensor_name(self, index: int) -> str:
        return ("sample", "act_scales", "noise_pred")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "output" if name == "noise_pred" else "input"

    def get_tensor_profile_shape(self, name: str, _profile: int) -> tuple[tuple[int, ...], ...]:
        return _SHAPES[name]

    def get_tensor_dtype(self, _name: str) -> str:
        return "half"

    def get_engine_stat(self, _statistic: int) -> int:
        return 5 * 2**20

    def create_execution_context(self, given: Any) -> Context:  # noqa: ANN401 - a strategy or a config
        return Context(self.gpus, given if isinstance(given, str) else given.strategy)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_engine_inspector(self) -> SimpleNamespace:
        return SimpleNamespace(get_engine_information=lambda _format: '{"Layers": []}')


class RuntimeConfig:
    """TensorRT-RTX's, with a cache of compiled kernels."""

    strategy = "static"
    cuda_graph_strategy = ""

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> SimpleNamespace:
        return SimpleNamespace(deserialize=lambda _kept: True, serialize=lambda: b"kernels")

    def set_runtime_cache(self, _cache: object) -> None:
        return


def stand_in_library(name: str, gpus: StandInGpus, **runtime: Any) -> ModuleType:  # noqa: ANN401 - parts of a Runtime
    """Makes a TensorRT, or TensorRT-RTX, of that name; ``runtime`` replaces methods of its Runtime."""
    own = {"deserialize_cuda_engine": lambda _plan: Engine(gpus)} | runtime
    library = ModuleType(name)
    library.__dict__.update(
        __version__="1.0",
        Logger=type("Logger", (), {"ERROR": 0, "__init__": lambda self, _level: None}),
        Runtime=lambda _logger: SimpleNamespace(**own),
        TensorIOMode=SimpleNamespace(INPUT="input"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="none"),
        EngineStat=SimpleNamespace(TOTAL_WEIGHTS_SIZE=0),
        EngineValidity=SimpleNamespace(VALID="valid", SUBOPTIMAL="suboptimal", INVALID="invalid"),
        EngineInvalidityDiagnostics=SimpleNamespace(
            __members__={
                "VERSION_MISMATCH": 1,
                "UNSUPPORTED_CC": 2,
                "OLD_CUDA_DRIVER": 4,
                "INSUFFICIENT_GPU_MEMORY": 16,
            }
        ),
        nptype=lambda _dtype: np.float16,
    )
    return library
