"""Blocks: parts of a network that parity is asked of one by one, and where activations enter and leave them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Tap:
    """A place where an activation can be seen: what a module is given, or what it gives."""

    module: str
    side: Literal["input", "output"]


@dataclass(frozen=True)
class Block:
    """The ``modules`` of a block, and where its activations enter and leave. Paths are relative to the network."""

    name: str
    modules: tuple[str, ...]
    entering: tuple[Tap, ...]
    leaving: tuple[Tap, ...]


def chain_block(name: str, modules: tuple[str, ...]) -> Block:
    """Modules in a row: one activation enters the first, one leaves the last."""
    return Block(name, modules, (Tap(modules[0], "input"),), (Tap(modules[-1], "output"),))
