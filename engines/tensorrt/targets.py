"""Compute capabilities: those that TensorRT-RTX names, builds for, and runs on.

TensorRT has none to choose: it builds for the GPU that it is on.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from s2p_deploy.errors import EngineBuildError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    import tensorrt_rtx as trt

Capability = tuple[int, int]

# Turing is built for only where it is named, because that costs the others speed, says NVIDIA. 8.0 is missing in its
# support matrices; its page "CPU-Only AOT and TensorRT-RTX Engines" says that default engines run on 8.0, 8.6, 8.9,
# 12.0 and later, and the library names it: it is taken at its word, and asked once more about each engine beside a
# driver. 9.0 (H100) and 10.0 (B200) are in none of these lists.
_WHERE_NAMED = ("7.5",)


def named_capabilities(library: ModuleType) -> tuple[Capability, ...]:
    """Lists the compute capabilities that a library can be told to build for, ascending; none: it has no choice."""
    names = getattr(getattr(library, "ComputeCapability", None), "__members__", {})
    found = (re.fullmatch(r"SM(\d+)(\d)", name) for name in names)
    return tuple(sorted((int(match[1]), int(match[2])) for match in found if match))


def runs_on(library: ModuleType, capability: Capability) -> bool:
    """Tells whether engines of TensorRT-RTX can run on a GPU: one that it names, or a later one than all of those."""
    named = named_capabilities(library)
    return capability in named or capability > max(named, default=capability)


def set_capabilities(library: ModuleType, config: trt.IBuilderConfig, chosen: Sequence[str]) -> None:
    """Sets what a build is for, such as ``7.5``; nothing chosen leaves it to the library.

    Raises:
        EngineBuildError: the library refuses one.
    """
    if not chosen:
        return
    config.num_compute_capabilities = len(chosen)
    for at, name in enumerate(chosen):
        kind = library.ComputeCapability.__members__[f"SM{name.replace('.', '')}"]
        if not config.set_compute_capability(kind, at):
            raise EngineBuildError(f"{library.__name__} refuses compute capability {name}: see its log")


def described_targets(library: ModuleType, chosen: Sequence[str]) -> str:
    """Says in words which GPUs an engine built for ``chosen`` runs on; nothing chosen is the library's default."""
    named = map(capability_name, named_capabilities(library))
    default = [name for name in named if name not in _WHERE_NAMED]
    return f"compute capability {', '.join(chosen or default)}" + ("" if chosen else " and later")


def capability_name(capability: Capability) -> str:
    """Formats a compute capability as NVIDIA does, e.g. ``8.6``."""
    return "{}.{}".format(*capability)
