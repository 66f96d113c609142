"""LoRAs of a service: registered by name at any time, from any thread, and acting in requests that name them.

A request keeps the LoRAs that it was accepted with, whatever happens to their names meanwhile. In the engine, all
requests of a batch share its ranks, each with its own strengths; in a text encoder, a request's LoRAs are in the
weights while its own texts are encoded.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.engines.lora_bank import BranchMatrices
from s2p_deploy.errors import InputError
from s2p_deploy.families.lora_fusing import fused
from s2p_deploy.pipeline.denoiser_loras import NO_BRANCHES
from s2p_deploy.pipeline.lora_files import text_encoders
from s2p_deploy.records.optional_inputs import LORA_STRENGTHS
from s2p_deploy.serve.generation_task import EngineCall
from s2p_deploy.serve.request import UnknownLoraError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from s2p_deploy.engines.lora_bank import LoraBank
    from s2p_deploy.families.lora import Lora
    from s2p_deploy.pipeline.lora_files import LoraReader
    from s2p_deploy.serve.generation_task import GenerationTask
    from s2p_deploy.serve.request import LoraWeight, RequestFuture

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MIB = 2**20
_NUMBERS = count(1)


@dataclass(frozen=True, eq=False)
class ServedLora:
    """A LoRA that requests may name.

    Attributes:
        name: for clients.
        matrices: for the engine's branches, in its type.
        text: its part that changes text encoders, in memory.
        number: counts registrations: another one may follow under the same name.
    """

    name: str
    matrices: BranchMatrices
    text: Lora
    number: int = field(default_factory=partial(next, _NUMBERS))

    @property
    def key(self) -> str:
        """Returns its name in the engine's bank."""
        return f"{self.name}#{self.number}"

    @cached_property
    def bytes(self) -> int:
        """Returns the memory that it takes."""
        text = (self.text.read(layer) for layer in self.text.layers)
        return self.matrices.bytes + sum(4 * (change.down.numel() + change.up.numel()) for change in text)


# a LoRA of a request, and the weight with which it acts there
ActiveLora = tuple[ServedLora, float]


class ServedLoras:
    """The LoRAs of a service by name; thread-safe.

    Args:
        bank: the engine's low-rank branches (None: it has none).
        reader: makes what reads files, once there is one to read (None: none can be added).
        most_bytes: memory that all may take together.
    """

    def __init__(
        self, bank: LoraBank | None = None, reader: Callable[[], LoraReader] | None = None, most_bytes: int = 0
    ) -> None:
        self.bank, self.most_bytes = bank, most_bytes
        self._reader = reader
        self._lock = threading.Lock()
        self._named: dict[str, ServedLora] = {}
        self._bytes: dict[ServedLora, int] = {}  # of those that are named or used
        self._used: Counter[ServedLora] = Counter()
        self._on_forgotten: Callable[[], None] = lambda: None

    @property
    def rank(self) -> int:
        """Returns how many ranks LoRAs of one batch may have together; 0 where the engine has no branches."""
        return 0 if self.bank is None else self.bank.slots.rank

    @property
    def all(self) -> tuple[ServedLora, ...]:
        """Lists them in the order of their names."""
        with self._lock:
            return tuple(self._named[name] for name in sorted(self._named))

    @property
    def keys(self) -> frozenset[str]:
        """Returns the keys of those that are named, or used."""
        with self._lock:
            return frozenset(lora.key for lora in self._bytes)

    def watch(self, on_forgotten: Callable[[], None]) -> None:
        """Has a function called, from any thread, whenever one is neither named nor used any more."""
        self._on_forgotten = on_forgotten

    def add(self, name: str, file: Path) -> ServedLora:
        """Reads a LoRA from a file, which is not needed afterwards, and gives it a name, or that of another one.

        Raises:
            InputError: the engine has no branches that fit, the file is no LoRA of this pipeline, its numbers are too
                large, it does not fit into the memory that is left, or the name is none.
        """
        if not _NAME.fullmatch(name):
            raise InputError(f"{name[:80]!r} is no name for a LoRA: give 1 to 64 letters, digits and ._-")
        if self.bank is None or self._reader is None:
            raise InputError(NO_BRANCHES)
        reader = self._reader()
        lora, component = reader.read(file), reader.denoiser
        matrices = BranchMatrices.of(lora, component, self.bank.slots).cast(self.bank.dtype, name)
        text = lora.in_memory({layer.component for layer in lora.layers} - {component})
        added = ServedLora(name, matrices, text)
        size = added.bytes
        with self._lock:
            former = self._named.get(name)
            stays = {one: taken for one, taken in self._bytes.items() if one is not former or self._used[one]}
            left = self.most_bytes - sum(stays.values())
            if size > left:
                raise InputError(
                    f"LoRA {name!r} takes {size / _MIB:.1f} MiB of memory, {max(0, left) / _MIB:.1f} of"
                    f" {self.most_bytes / _MIB:.0f} are left: remove another one, or serve with more --lora-memory"
                )
            self._named[name] = added
            forgotten = len(stays) < len(self._bytes)
            self._bytes = stays | {added: size}
        if forgotten:
            self._on_forgotten()
        return added

    def remove(self, name: str) -> None:
        """Forgets a name; requests that were accepted with the LoRA are drawn with it.

        Raises:
            UnknownLoraError: there is none of that name.
        """
        with self._lock:
            self._of(name)
            del self._named[name]
        self._forget()

    def use(self, weights: Iterable[LoraWeight]) -> tuple[ActiveLora, ...]:
        """Returns the LoRAs of a request, which are kept until :meth:`unuse`; one of weight 0 is none.

        Raises:
            UnknownLoraError: there is none of a name.
            InputError: together they have more ranks than the engine, or a weight is beyond its type.
        """
        with self._lock:
            # in one order, as a sum of floats depends on it
            found = sorted(((self._of(one.name), one.weight) for one in weights), key=lambda pair: pair[0].name)
            active = tuple((lora, weight) for lora, weight in found if weight != 0)
            ranks = sum(lora.matrices.rank for lora, _ in active)
            if ranks > self.rank:
                raise InputError(
                    f"the LoRAs of this request have {ranks} ranks together, this engine takes {self.rank}: leave one"
                    " out"
                )
            for lora, weight in active:
                if self.bank is not None:
                    self.bank.check_strength(lora.name, weight)
            self._used.update(lora for lora, _ in active)
        return active

    def unuse(self, active: Iterable[ActiveLora]) -> None:
        """Ends one :meth:`use`."""
        with self._lock:
            self._used -= Counter(lora for lora, _ in active)
        self._forget()

    def _of(self, name: str) -> ServedLora:
        if name not in self._named:
            there = ", ".join(sorted(self._named)) or "none"
            raise UnknownLoraError(f"there is no LoRA {name[:80]!r}: those of this model are {there}")
        return self._named[name]

    def _forget(self) -> None:
        with self._lock:
            kept = {*self._named.values(), *self._used}
            stays = {lora: size for lora, size in self._bytes.items() if lora in kept}
            forgotten = len(stays) < len(self._bytes)
            self._bytes = stays
        if forgotten:
            self._on_forgotten()


class BatchedLoras:
    """The LoRAs of active requests in the engine's branches. Used by the generation loop's thread alone."""

    def __init__(self, served: ServedLoras) -> None:
        self._served, self._bank = served, served.bank

    def fitting(self, active: Iterable[GenerationTask], waiting: Sequence[RequestFuture]) -> list[RequestFuture]:
        """Selects those of the waiting, oldest first, whose LoRAs fit beside those of the active.

        Behind the first that has to wait for ranks no other with LoRAs is selected, or it might wait for ever.
        """
        there = {lora for task in active for lora, _ in task.future.loras}
        selected, full = [], False
        for future in waiting:
            own = {lora for lora, _ in future.loras}
            ranks = sum(lora.matrices.rank for lora in there | own)
            full = full or (bool(own) and ranks > self._served.rank)
            if own and full:
                continue
            there |= own
            selected.append(future)
        return selected

    def prune(self) -> None:
        """Takes those out of the engine's memory that are neither named nor used."""
        if self._bank is not None:
            for key in set(self._bank.names) - self._served.keys:
                self._bank.remove(key)

    def begin(self, future: RequestFuture) -> None:
        """Gives the engine the LoRAs of a request that begins."""
        if self._bank is None:
            return
        for lora, _ in future.loras:
            if lora.key not in self._bank.names:
                self._bank.add(lora.key, lora.matrices)
        self._bank.hold(lora.key for lora, _ in future.loras)

    def end(self, future: RequestFuture) -> None:
        """Ends :meth:`begin`."""
        if self._bank is not None:
            self._bank.release(lora.key for lora, _ in future.loras)

    def with_strengths(self, tasks: Sequence[GenerationTask], calls: Sequence[EngineCall]) -> list[EngineCall]:
        """Adds to the calls of tasks, which are one batch, how strongly each sample has the LoRAs of its request."""
        if self._bank is None or not any(task.future.loras for task in tasks):
            return list(calls)
        sizes = [call.samples for call in calls]
        rows = [{lora.key: weight for lora, weight in task.future.loras} for task in tasks]
        strengths = self._bank.strengths([row for row, size in zip(rows, sizes, strict=True) for _ in range(size)])
        given = []
        for call, own in zip(calls, np.split(strengths, np.cumsum(sizes)[:-1]), strict=True):
            inputs: dict[str, Any] = dict(call.inputs)
            given.append(EngineCall(inputs | {LORA_STRENGTHS: torch.from_numpy(own) if call.on_device else own}))
        return given


class TextEncoderWithLoras:
    """A text encoder that has LoRAs in its weights in every call, and not between; its attributes are its own.

    Calls come from one thread, that of everybody who uses the network.
    """

    def __init__(self, component: str, network: torch.nn.Module, loras: Sequence[tuple[Lora, float]]) -> None:
        self._component, self._network, self._loras = component, network, loras

    def __call__(self, *args: object, **kwargs: object) -> Any:  # noqa: ANN401 - what the network returns
        """Calls the network."""
        with fused({self._component: self._network}, self._loras):
            return self._network(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - an attribute of any kind
        return getattr(self._network, name)


def changed_text_encoders(pipe: DiffusionPipeline, active: Iterable[ActiveLora]) -> Mapping[str, TextEncoderWithLoras]:
    """Makes those text encoders of a pipeline, by component, that LoRAs of a request change."""
    loras = [(lora.text, weight) for lora, weight in active]
    changed = {layer.component for lora, _ in loras for layer in lora.layers}
    return {
        name: TextEncoderWithLoras(name, network, loras)
        for name, network in text_encoders(pipe).items()
        if name in changed
    }
