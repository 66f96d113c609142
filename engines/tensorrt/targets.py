"""Compute capabilities: those that TensorRT-RTX names, builds for, and runs on.

TensorRT has none to choose: it builds for the GPU that it is on.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    import tensorrt_rtx as trt

Capability = tuple[int, int]

# Turing costs the others speed, says NVIDIA: it is built for only where it is named. The support matrices leave 8.0 out,
# while "CPU-Only AOT and TensorRT-RTX Engines" says that default engines run on 8.0, 8.6, 8.9, 12.0 and later, and the
# library names it: it is taken at its word, and says more of each engine once it is loaded beside a driver. 9.0 (H100)
# and 10.0 (B200) are in none of these lists.
_WHERE_NAMED = ((7, 5),)


def named_capabilities(library: ModuleType) -> tuple[Capability, ...]:
    """Lists the compute capabilities that a library can be told to build for, ascending; none where it has no choice."""
    names = getattr(getattr(library, "ComputeCapability", None), "__members__", {})
    found = (re.fullmatch(r"SM(\d+)(\d)", name) for name in names)
    return tuple(sorted((int(match[1]), int(match[2])) for match in found if match))


def runs_on(library: ModuleType, capability: Capability) -> bool:
    """Tells whether engines of TensorRT-RTX can run on a GPU: one that it names, or a later one than all of those."""
    named = named_capabilities(library)
    return capability in named or capability > max(named, default=capability)


def chosen_capabilities(library: ModuleType, names: Sequence[str]) -> tuple[Capability, ...]:
    """Reads compute capabilities such as ``7.5``.

    Raises:
        InputError: the library does not build for one of them.
    """
    known = {capability_name(capability): capability for capability in named_capabilities(library)}
    for name in names:
        if name not in known:
            raise InputError(
                f"{library.__name__} {library.__version__} does not build for compute capability {name!r}: use "
                + ", ".join(known)
            )
    return tuple(known[name] for name in names)


def set_capabilities(library: ModuleType, config: trt.IBuilderConfig, chosen: Sequence[Capability]) -> None:
    """Sets what a build is for; nothing chosen leaves it to the library."""
    if not chosen:
        return
    config.num_compute_capabilities = len(chosen)
    for at, (major, minor) in enumerate(chosen):
        config.set_compute_capability(library.ComputeCapability.__members__[f"SM{major}{minor}"], at)


def described_targets(library: ModuleType, chosen: Sequence[Capability]) -> str:
    """Says in words which GPUs an engine built for ``chosen`` runs on; nothing chosen is the library's default."""
    default = [capability for capability in named_capabilities(library) if capability not in _WHERE_NAMED]
    names = ", ".join(map(capability_name, chosen or default))
    return f"compute capability {names}" + ("" if chosen else " and later")


def capability_name(capability: Capability) -> str:
    """Formats a compute capability as NVIDIA does, e.g. ``8.6``."""
    return "{}.{}".format(*capability)
