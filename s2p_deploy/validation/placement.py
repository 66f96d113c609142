"""Where references compute: on the device that was asked for, else on the engine's own, each while it is needed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from s2p_deploy.metrics import CPU

if TYPE_CHECKING:
    from collections.abc import Iterator

    from s2p_deploy.context import Context
    from s2p_deploy.records import Engine

# Compute capabilities with half as many operations in float64 as in float32; others have 1/32 or 1/64 as many.
_FAST_IN_FLOAT64 = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})


class _Placed(Protocol):
    """A network or a pipeline of several."""

    @property
    def device(self) -> torch.device: ...

    def to(self, device: torch.device, /) -> Any: ...  # noqa: ANN401 - itself


def reference_device(engine: Engine, context: Context) -> torch.device:
    """Returns the device of an engine's references: the context's, and where that is ``auto``, the engine's own."""
    return CPU if context.device == "auto" and not engine.on_gpu else context.torch_device


def float64_device(device: torch.device) -> torch.device:
    """Returns where float64 is computed for ``device``: there, or on the CPU where a GPU takes 32 times as long."""
    slow = device.type == "cuda" and torch.cuda.get_device_capability(device) not in _FAST_IN_FLOAT64
    return CPU if slow else device


@contextmanager
def onloaded(network: _Placed, device: torch.device) -> Iterator[None]:
    """Keeps a network, or all of a pipeline's, on ``device`` while the context lasts; it goes back to where it was.

    The references of a full-size model do not fit beside each other and the engine.
    """
    before = network.device
    if before == device:
        yield
        return
    try:
        network.to(device)
        yield
    finally:
        network.to(before)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # an engine's library cannot take what PyTorch keeps
