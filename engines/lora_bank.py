"""The LoRAs that lie in an engine's low-rank branches: which ranks are whose, and how strongly each sample has them."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records.optional_inputs import LORA_DOWN, LORA_UP

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from s2p_deploy.families.lora import Lora
    from s2p_deploy.records.optional_inputs import LoraSlot, LoraSlots

    # name of a bound input, and its values from now on
    Rebind = Callable[[str, NDArray[Any]], None]
    # a LoRA's strengths in one sample, by name
    Strengths = Mapping[str, float]


@dataclass(frozen=True)
class BranchMatrices:
    """The matrices of a LoRA for an engine's branches, by layer: down [rank, in, ...], up [out, rank] times the scale.

    ``rank`` is the largest of its layers; the others leave the rest of their ranks zero.
    """

    rank: int
    down: Mapping[str, NDArray[np.floating[Any]]]
    up: Mapping[str, NDArray[np.floating[Any]]]

    def cast(self, dtype: str, name: str) -> BranchMatrices:
        """Casts the matrices to an engine's type. Raises InputError where a number is too large for it."""
        with np.errstate(over="ignore"):
            sides = (self.down, self.up)
            down, up = ({path: m.astype(dtype, copy=False) for path, m in side.items()} for side in sides)
        if not all(np.isfinite(matrix).all() for side in (down, up) for matrix in side.values()):
            raise InputError(f"LoRA {name!r} has numbers beyond {dtype}: build an engine of fp32 for it, or fuse it")
        return BranchMatrices(self.rank, down, up)

    @property
    def bytes(self) -> int:
        """Returns the memory that it takes."""
        return sum(matrix.nbytes for side in (self.down, self.up) for matrix in side.values())

    @staticmethod
    def of(lora: Lora, component: str, slots: LoraSlots) -> BranchMatrices:
        """Reads what a LoRA changes in the denoiser, ``component`` of its pipeline.

        Raises:
            InputError: a layer has no branch, the rank is above the engine's, or it is a DoRA.
        """
        from s2p_deploy.families.lora import check_low_rank

        layers = [layer for layer in lora.layers if layer.component == component]
        check_low_rank(lora.file, layers)
        known = {slot.layer for slot in slots.layers}
        without = next((layer for layer in layers if layer.path not in known), None)
        if without is not None:
            raise InputError(
                f"LoRA {lora.file} changes {without.path}, where this engine has no branch: export with --lora-for this"
                " file, or with more --lora-layers"
            )
        rank = max((layer.rank for layer in layers), default=0)
        if rank > slots.rank:
            raise InputError(
                f"LoRA {lora.file} has rank {rank}, this engine takes {slots.rank}: export with --lora-rank {rank} or"
                " more"
            )
        changes = {layer.path: lora.read(layer) for layer in layers}
        down = {path: change.down.numpy() for path, change in changes.items()}
        up = {path: change.up.numpy() * np.float32(change.scale) for path, change in changes.items()}
        return BranchMatrices(rank, down, up)


class LoraBank:
    """The low-rank branches of a loaded engine.

    LoRAs are added by name and take ranks when they are first used; where none are free, those that were used longest
    ago give way, unless somebody holds them. Others may move then, so strengths are made for one call, not kept. Calls
    come from one thread, that of the engine; :meth:`forget` and :meth:`check_strength` from any.

    Args:
        slots: the engine's branches.
        dtype: of the packed inputs.
        sizes: of the packed inputs, by name.
        rebind: gives the engine other values of them.

    Attributes:
        version: counts how often the matrices were written.

    Raises:
        IntegrityError: a branch lies outside the inputs.
    """

    def __init__(self, slots: LoraSlots, dtype: str, sizes: Mapping[str, int], rebind: Rebind) -> None:
        self.slots = slots
        self.version = 0
        self._packed = {name: np.zeros(size, dtype) for name, size in sizes.items()}
        self._rebinds = [rebind]
        self._added: dict[str, BranchMatrices] = {}
        self._ranks: dict[str, slice] = {}  # of those that were used, that of the oldest use first
        self._held: Counter[str] = Counter()
        self._forgotten: deque[str] = deque()
        try:
            for slot in slots.layers:
                self._views(slot)
        except (ValueError, TypeError) as error:  # NumPy's word for a view that leaves its memory
            raise IntegrityError("the engine's low-rank branches leave their inputs: build it again") from error

    @property
    def dtype(self) -> str:
        """Returns the type of the matrices."""
        return self._packed[LORA_DOWN].dtype.name

    @property
    def packed(self) -> Mapping[str, NDArray[np.floating[Any]]]:
        """Returns ``lora_down`` and ``lora_up`` as they are now, to be read alone."""
        return self._packed

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of all LoRAs."""
        self._remove_forgotten()
        return tuple(self._added)

    def share(self, rebind: Rebind) -> None:
        """Gives another engine with the same branches the matrices too, from now on."""
        self._rebinds.append(rebind)

    def rank(self, names: Collection[str]) -> int:
        """Returns how many ranks LoRAs take together. Raises InputError for an unknown name."""
        return sum(self._known(name).rank for name in set(names))

    def add(self, name: str, matrices: BranchMatrices) -> None:
        """Adds a LoRA under a name, or replaces the one of that name; raises as :meth:`BranchMatrices.cast`."""
        cast = matrices.cast(self.dtype, name)
        self._remove_forgotten()
        self.remove(name)
        self._added[name] = cast

    def repeat(self, name: str, other: str) -> None:
        """Adds a LoRA that is there under another name too, without a copy of its matrices."""
        self._added[other] = self._known(name)

    def remove(self, name: str) -> None:
        """Forgets a LoRA, if there is one of that name; its ranks become free."""
        self._added.pop(name, None)
        self._ranks.pop(name, None)

    def forget(self, names: Iterable[str]) -> None:
        """Has LoRAs removed before the next call that names, adds or uses any; a finalizer may call this."""
        self._forgotten.extend(names)

    def _remove_forgotten(self) -> None:
        while self._forgotten:
            self.remove(self._forgotten.popleft())

    def hold(self, names: Iterable[str]) -> None:
        """Keeps the ranks of LoRAs until they are released as often."""
        self._held.update(names)

    def release(self, names: Iterable[str]) -> None:
        """Ends one :meth:`hold`."""
        self._held -= Counter(names)

    def strengths(self, samples: Sequence[Strengths]) -> NDArray[np.floating[Any]]:
        """Makes ``lora_strengths`` [batch, rank] of the strengths in each sample; puts LoRAs in where they are not yet.

        Raises:
            InputError: an unknown name, more ranks than the engine has, or as :meth:`check_strength`.
        """
        self._remove_forgotten()
        used = dict.fromkeys(name for sample in samples for name, strength in sample.items() if strength != 0)
        self._place(list(used))
        values = np.zeros((len(samples), self.slots.rank), np.float64)
        for row, sample in zip(values, samples, strict=True):
            for name, strength in sample.items():
                self._known(name)
                self.check_strength(name, strength)
                if strength != 0:
                    row[self._ranks[name]] = strength
        return values.astype(self.dtype)

    def check_strength(self, name: str, strength: float) -> None:
        """Checks that a strength is finite in the engine's type. Raises InputError where it is not."""
        with np.errstate(over="ignore"):
            cast = np.float64(strength).astype(self.dtype)
        if not np.isfinite(cast):
            raise InputError(f"the strength {strength} of LoRA {name!r} must be a finite number of {self.dtype}")

    def _known(self, name: str) -> BranchMatrices:
        if name not in self._added:
            there = ", ".join(self._added) or "none"
            raise InputError(f"there is no LoRA {name!r}: those of this engine are {there}")
        return self._added[name]

    def _place(self, names: Sequence[str]) -> None:
        """Gives LoRAs ranks, and the engine their matrices."""
        missing = [name for name in names if name not in self._ranks and self._known(name).rank]
        for name in names:
            self._ranks[name] = self._ranks.pop(name, slice(0, 0))  # as the last that was used
        if not missing:
            return
        kept = {name for name in self._ranks if name in names or self._held[name]}
        needed = self.rank(kept)
        if needed > self.slots.rank:
            for name in missing:
                del self._ranks[name]
            raise InputError(
                f"LoRAs {', '.join(sorted(kept))} have {needed} ranks together, this engine takes {self.slots.rank}:"
                f" export with --lora-rank {needed}"
            )
        for oldest in [name for name in self._ranks if name not in kept]:
            if self.rank(self._ranks) > self.slots.rank:
                del self._ranks[oldest]
        # By name: a product over the ranks adds the terms of several LoRAs in one order, so that no sample's bits
        # depend on which came first.
        start = 0
        for name in sorted(self._ranks):
            ranks = slice(start, start + self._added[name].rank)
            start = ranks.stop
            if ranks != self._ranks[name]:
                self._ranks[name] = ranks
                self._write(name)
        self.version += 1
        for rebind, (name, values) in product(self._rebinds, self._packed.items()):
            rebind(name, values)

    def _write(self, name: str) -> None:
        """Writes a LoRA's matrices at its ranks of every branch; zeros where it changes nothing."""
        matrices, ranks = self._added[name], self._ranks[name]
        for slot in self.slots.layers:
            down, up = self._views(slot)
            own = ranks.start
            if slot.layer in matrices.down:
                matrix = matrices.down[slot.layer]
                own += len(matrix)
                down[ranks.start : own] = matrix.reshape(len(matrix), -1)
                up[ranks.start : own] = matrices.up[slot.layer].T
            down[own : ranks.stop] = up[own : ranks.stop] = 0

    def _views(self, slot: LoraSlot) -> tuple[NDArray[Any], NDArray[Any]]:
        """Returns a branch's matrices [rank, inputs] and [rank, outputs], in the packed memory."""
        rank, inputs = self.slots.rank, int(np.prod(slot.inputs))
        apart = rank * slot.width
        down_steps = (inputs, 1) if slot.op == "conv" else (1, apart)
        up_steps = (1, rank) if slot.op == "conv" else (slot.outputs, 1)
        return (
            _view(self._packed[LORA_DOWN], slot.down, (rank, inputs), down_steps),
            _view(self._packed[LORA_UP], slot.up, (rank, slot.outputs), up_steps),
        )


def _view(flat: NDArray[Any], start: int, shape: tuple[int, int], steps: tuple[int, int]) -> NDArray[Any]:
    """Returns a matrix in flat memory, where NumPy checks that it lies; ``steps`` are elements from row to row."""
    size = flat.itemsize
    strides = (steps[0] * size, steps[1] * size)
    return np.ndarray(shape, flat.dtype, buffer=flat.data, offset=start * size, strides=strides)
