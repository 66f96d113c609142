"""Bytes of memory that tensors take: of a device, as it counts them, or of any tensors, as they live."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from s2p_deploy.errors import MissingEnvironmentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

GIB = 2**30
SHARE = 0.85  # of the memory that is planned with: the rest is fragments and the libraries' workspaces
_MOST = 128  # samples: more at once make nothing faster
_BLOCK = 512  # bytes


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators made inside and that still live; of fake tensors, too.

    ``now`` and ``most`` are what lives and the most that ever did. What was made before is counted from :meth:`add` on.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made elsewhere; one that is known is not counted again."""
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = in_blocks(storage.nbytes())
        self.now += self._sizes[key]
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Callable[..., Any], _types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - whatever the operator returns
        """Calls an operator and counts what it made."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, result)
        return result


def in_blocks(size: int) -> int:
    """Rounds bytes up as CUDA's allocator does."""
    return -(-size // _BLOCK) * _BLOCK


class DeviceMemory(Protocol):
    """The counters of a device's memory."""

    def free(self) -> int:
        """Returns the bytes that tensors can still take."""

    def most_during(self, run: Callable[[], object]) -> int:
        """Returns the most bytes that tensors took at once while ``run`` ran, beside those that were there."""


class CudaMemory:
    """The counters of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int:
        """Returns what the driver has left, and what PyTorch holds without using it."""
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    def most_during(self, run: Callable[[], object]) -> int:
        """Returns the most bytes that tensors took at once while ``run`` ran, beside those that were there."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        return torch.cuda.max_memory_allocated(self.device) - before


def memory_of(device: torch.device) -> DeviceMemory | None:
    """Returns the counters of a device, or None where it has none: a CPU's memory is not counted."""
    return CudaMemory(device) if device.type == "cuda" else None


def usable_memory(device: torch.device, limit: int | None) -> int | None:
    """Returns the bytes that a run may plan with: what is free, no more than ``limit``; None: they are not counted."""
    counters = memory_of(device)
    known = [size for size in (limit, None if counters is None else counters.free()) if size is not None]
    return min(known, default=None)


def samples_that_fit(run: Callable[[int], object], memory: DeviceMemory, *, beside: int = 0) -> int:
    """Finds how many samples to compute at once: the largest power of two whose bytes leave a share of memory free.

    Args:
        run: computes that many samples. It is measured with one and with two, after a first time that is not.
        memory: of the device where it does.
        beside: bytes that something else will take at the same time.

    Raises:
        MissingEnvironmentError: there is no room for one.
    """
    run(1)  # libraries take their workspaces
    one, two = memory.most_during(lambda: run(1)), memory.most_during(lambda: run(2))
    each = max(1, two - one)
    room = int(SHARE * memory.free()) - beside
    if one > room:
        raise MissingEnvironmentError(
            f"one sample takes {gib(one)} of memory beside {gib(beside)} of the training, and {gib(memory.free())} are"
            " free: end what else uses the GPU, or use --device cpu"
        )
    fitting = min(_MOST, 1 + (room - one) // each)
    return 1 << (fitting.bit_length() - 1)


def gib(size: float) -> str:
    """Formats bytes."""
    return f"{size / GIB:.1f} GiB"
