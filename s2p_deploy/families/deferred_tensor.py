"""Deferred tensors: without data, they remember how they are computed from tensors that are stored.

Functions that translate checkpoints take whole tensors and rename, split and transpose them. Given deferred ones, they
say what becomes of every tensor before anything is read; then each result is computed alone, from what it needs.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from s2p_deploy.families.checkpoint import TensorForm


class DeferredTensor(torch.Tensor):
    """A tensor on the meta device whose data :meth:`read` computes, each time anew.

    Attributes:
        sources: names of the stored tensors that it is computed from.
    """

    _meta: Tensor
    _compute: Callable[[], Tensor]
    sources: frozenset[str]

    @staticmethod
    def __new__(
        cls: type[DeferredTensor], meta: Tensor, compute: Callable[[], Tensor], sources: frozenset[str]
    ) -> DeferredTensor:
        """Makes a tensor like ``meta``; it is no parameter, so nothing of it is trained."""
        made: DeferredTensor = torch.Tensor._make_wrapper_subclass(
            cls, meta.size(), strides=meta.stride(), dtype=meta.dtype, device=meta.device
        )
        made._meta, made._compute, made.sources = meta, compute, sources
        return made

    @staticmethod
    def stored(name: str, form: TensorForm, read: Callable[[str], Tensor]) -> DeferredTensor:
        """Defers a stored tensor, which ``read`` reads by its name."""
        meta = torch.empty(form.shape, dtype=form.dtype, device="meta")
        return DeferredTensor(meta, lambda: read(name), frozenset([name]))

    @staticmethod
    def of(tensor: Tensor) -> DeferredTensor:
        """Takes a tensor that is there already, deferred or not."""
        if isinstance(tensor, DeferredTensor):
            return tensor
        return DeferredTensor(tensor.to("meta"), lambda: tensor, frozenset())

    def read(self) -> Tensor:
        """Computes its data, on the CPU. Raises what reading a stored tensor raises."""
        return self._compute()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch calls it as it documents it
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - as torch has it
        """Applies an operator to shapes alone, and defers its results."""
        given = (args, kwargs or {})
        deferred = [leaf for leaf in tree_leaves(given) if isinstance(leaf, DeferredTensor)]
        sources = frozenset[str]().union(*(tensor.sources for tensor in deferred))

        def results() -> Any:  # noqa: ANN401 - one tensor or several
            positional, named = tree_map(lambda leaf: leaf.read() if isinstance(leaf, DeferredTensor) else leaf, given)
            return func(*positional, **named)

        positional, named = tree_map(lambda leaf: leaf._meta if isinstance(leaf, DeferredTensor) else leaf, given)
        made = func(*positional, **named)
        if isinstance(made, torch.Tensor):
            return DeferredTensor(made, results, sources)
        return [DeferredTensor(part, partial(_part, results, index), sources) for index, part in enumerate(made)]


def _part(results: Callable[[], Sequence[Tensor]], index: int) -> Tensor:
    return results()[index]
