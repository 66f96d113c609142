"""A second device on a machine that has none: PyTorch's Python backend for PrivateUse1, computing on the CPU.

``pretended_device()`` registers the device type ``pretend``. A tensor there is a wrapper whose device is real for the
dispatcher, for autograd (its backward passes run in the device's own thread) and for ``nn.Module.to``; its data are a
CPU tensor, so values, shapes and control flow are the real ones. Operators refuse what CUDA refuses: operands on two
devices, but for zero-dimensional CPU operands of pointwise operators, CPU indices of a device tensor, and copies.
``LEDGER`` records every crossing of the border, every wait of the host, and the arithmetic of both sides, with the
project's line that caused it.

Not seen: kernels that a GPU lacks or rounds otherwise, streams and races, memory, casting by autocast, a literal
"cuda" in the code. Nothing here is public API of PyTorch ("experimental"): a test says which functions it needs.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAME = "pretend"
ROOT = str(Path(__file__).resolve().parents[2])
aten = torch.ops.aten

_COPIES = {
    aten.copy_.default,
    aten._to_copy.default,
    aten._copy_from.default,
    aten.copy.default,
    aten.set_.source_Tensor,
}
_INDEXED = {  # the tensor and its values are on one device; indices may be on the CPU
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
}
_TAKE_SCALARS = {  # pointwise in fact, without the tag
    aten.where.self,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.fill_.Tensor,
    aten.lerp.Tensor,
}
_WAITS = {  # the host waits for a value, or for a size that depends on one
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
    aten._linalg_check_errors.default,
}
_FACTORIES = ("arange", "arange.start", "arange.start_step", "linspace", "eye", "full", "logspace")


class PlacementError(RuntimeError):
    """CUDA would raise this."""


@dataclass
class Ledger:
    """Counts by (stage, what, operator, place): crossings and waits, their bytes; FLOPs by (stage, device, place)."""

    crossings: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    flops: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    stage: str = ""

    def cross(self, what: str, operator: object, size: int) -> None:
        """Records a crossing: ``h2d``, ``h2d async``, ``d2h`` or ``wait``."""
        key = (self.stage, what, str(operator).removeprefix("aten."), _place())
        self.crossings[key] += 1
        self.bytes[key] += size

    def work(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: object, device: str) -> None:
        """Records the FLOPs of a convolution or matrix product."""
        if _multiplies(operator):
            count = flop_registry[operator.overloadpacket]
            self.flops[self.stage, device, _place()] += count(*args, **kwargs, out_val=result)

    def work_of(self, stage: str) -> dict[str, int]:
        """Counts a stage's FLOPs by device."""
        total = dict.fromkeys((NAME, "cpu"), 0)
        for (name, device, _), flops in self.flops.items():
            if name == stage:
                total[device] += flops
        return total

    def host_share(self, stage: str) -> float:
        """Computes the share of a stage's FLOPs that the CPU did."""
        total = self.work_of(stage)
        return total["cpu"] / max(1, sum(total.values()))

    def table(self, title: str) -> str:
        """Lists stages: MFLOP on the device and on the host, uploads, downloads and waits for a value."""
        lines = [f"{title + ':':<34}{'device':>12}{'host MFLOP':>12}{'up':>8}{'down':>8}{'waits':>8}"]
        for stage in dict.fromkeys(key[0] for book in (self.flops, self.crossings) for key in book):
            work = self.work_of(stage)
            counts: Counter[str] = Counter()
            for (name, what, *_), count in self.crossings.items():
                counts[what.removesuffix(" async")] += count * (name == stage)
            crossed = "".join(f"{counts[what]:>8}" for what in ("h2d", "d2h", "wait"))
            lines.append(f"  {stage:<32}{work[NAME] / 1e6:>12.1f}{work['cpu'] / 1e6:>12.1f}{crossed}")
        return "\n".join(lines)

    def waits(self, stage: str) -> dict[str, int]:
        """Counts what the host waits for in a stage, by operator and place: values, sizes and copies to the host."""
        counted: Counter[str] = Counter()
        for (name, what, operator, place), count in self.crossings.items():
            if name == stage and what in {"wait", "d2h"}:
                counted[f"{what} {operator} at {place}"] += count
        return dict(counted)

    def clear(self) -> None:
        """Forgets everything."""
        for book in (self.crossings, self.bytes, self.flops):
            book.clear()


LEDGER = Ledger()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Names what is recorded inside."""
    before, LEDGER.stage = LEDGER.stage, name
    try:
        yield
    finally:
        LEDGER.stage = before


def _multiplies(operator: Any) -> bool:
    """Tells whether an operator is a convolution or a matrix product."""
    return getattr(operator, "overloadpacket", None) in flop_registry


def _place() -> str:
    """Names the innermost line of the project on the stack, and the library's function that it called."""
    frame, library = sys._getframe(2), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/site-packages/" in name:
            if "/torch/" not in name:
                library = f" < {frame.f_code.co_name} of {name.split('/site-packages/')[-1]}:{frame.f_lineno}"
        elif name.startswith(ROOT) and not name.startswith(str(Path(__file__).parent)):
            return f"{name.removeprefix(ROOT + '/')}:{frame.f_lineno} {frame.f_code.co_name}{library}"
        frame = frame.f_back  # type: ignore[assignment] # None ends it
    return library or "?"


# An operator's arguments and results hold tensors in lists, tuples and one dictionary: walked here, because PyTorch's
# own pytrees took half of the time.


def _mapped(convert: Callable[[Any], Any], tree: Any) -> Any:
    """Converts the leaves of arguments or results."""
    if isinstance(tree, list | tuple):
        return type(tree)([_mapped(convert, value) for value in tree])
    if isinstance(tree, dict):
        return {name: _mapped(convert, value) for name, value in tree.items()}
    return convert(tree)


def _host(tree: Any) -> Any:
    return _mapped(lambda leaf: leaf.host if isinstance(leaf, DeviceTensor) else leaf, tree)


def _on_device(tree: Any) -> Any:
    def wrapped(leaf: Any) -> Any:
        return DeviceTensor(leaf) if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DeviceTensor) else leaf

    return _mapped(wrapped, tree)


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for value in tree for tensor in _tensors(value)]


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended device; ``host`` holds its data."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls: type[DeviceTensor], host: torch.Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        made.host = host
        return made

    def __repr__(self, **_: object) -> str:
        return f"DeviceTensor({list(self.shape)}, {self.dtype})"

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first")
        return self.cpu().numpy()

    def __array__(self, dtype: object = None) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first")

    def tolist(self) -> Any:
        LEDGER.cross("wait", "tolist", _size(self))
        return self.host.tolist()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:  # safetensors looks there for shared memory
        return self.host.untyped_storage()

    def __deepcopy__(self, memo: dict[int, object]) -> torch.Tensor:
        if id(self) not in memo:
            copied: torch.Tensor = DeviceTensor(self.host.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        found = memo[id(self)]
        assert isinstance(found, torch.Tensor)
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operator of the device on the CPU tensors behind it."""
    _check(func, args, kwargs)
    if func is aten._to_copy.default:
        return _to(func, args, kwargs)
    if func is aten.copy_.default:
        return _copy(args)
    _count_waits(func, args, kwargs)
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if target is not None and target.type == "cpu":  # such as zeros_like(x, device="cpu")
        return func(*_host(args), **_host(kwargs))
    if target is not None and target.type == NAME:
        kwargs = kwargs | {"device": torch.device("cpu")}
    host_args, host_kwargs = _host((args, kwargs))
    result = func(*host_args, **host_kwargs)
    LEDGER.work(func, host_args, host_kwargs, result, NAME)
    return return_and_correct_aliasing(func, args, kwargs, _on_device(result))


def _count_waits(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if func in _WAITS:
        LEDGER.cross("wait", func, sum(map(_size, _tensors((args, kwargs))[:1])))
    if func in _INDEXED:
        for index in _tensors(args[1]):
            if not isinstance(index, DeviceTensor):
                LEDGER.cross("h2d", func, _size(index))
            elif index.dtype in (torch.bool, torch.uint8):
                LEDGER.cross("wait", func, _size(index))


def _to(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    source = args[0]
    target = source.device if kwargs.get("device") is None else torch.device(kwargs["device"])
    plain = {name: value for name, value in kwargs.items() if name not in {"device", "non_blocking"}}
    if target.type == "meta":
        return func(_host(source), device=target, **plain)
    result = func(_host(source), device=torch.device("cpu"), **plain)
    if target.type == "cpu":
        if isinstance(source, DeviceTensor):
            LEDGER.cross("d2h", func, _size(source))
        return result
    if not isinstance(source, DeviceTensor):
        LEDGER.cross("h2d async" if kwargs.get("non_blocking") else "h2d", func, _size(source))
    return DeviceTensor(result)


def _copy(args: Any) -> Any:
    to, source = args[0], args[1]
    there, here = isinstance(to, DeviceTensor), isinstance(source, DeviceTensor)
    if there != here:
        upload = "h2d async" if len(args) > 2 and args[2] else "h2d"
        LEDGER.cross(upload if there else "d2h", "copy_", _size(source))
    _host(to).copy_(_host(source))
    return to


def _check(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises what CUDA raises for operands on two devices."""
    if func in _COPIES:
        return
    operands = _tensors((args, kwargs))
    if func in _INDEXED:
        operands = [args[0], *args[2:3]]
        if not isinstance(args[0], DeviceTensor) and any(isinstance(index, DeviceTensor) for index in args[1]):
            raise PlacementError(f"indices should be on cpu or on the indexed tensor's device [{func} at {_place()}]")
    operands = _tensors(operands)
    here = [tensor for tensor in operands if not isinstance(tensor, DeviceTensor) and tensor.device.type == "cpu"]
    if not here or len(here) == len(operands):
        return
    pointwise = torch.Tag.pointwise in func.tags or func in _INDEXED | _TAKE_SCALARS
    if not (pointwise and all(tensor.dim() == 0 for tensor in here)):
        raise PlacementError(f"Expected all tensors to be on the same device [{func} at {_place()}]")


class HostWork(TorchDispatchMode):
    """Records the arithmetic of plain CPU tensors inside, of this thread."""

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if _multiplies(func) and all(tensor.device.type == "cpu" for tensor in _tensors((args, kwargs, result))):
            LEDGER.work(func, args, kwargs, result, "cpu")
        return result


class _Backend(_DummyBackendModule):  # type: ignore[misc] # not typed
    """PyTorch's module of the device type, ``torch.pretend``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)


@cache
def _libraries() -> tuple[torch.library.Library, torch.library.Library]:
    """Registers the device's kernels; they live as long as these objects."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    all_of_it = torch.library.Library("_", "IMPL")
    all_of_it.fallback(lambda func, *args, **kwargs: _dispatch(func, args, kwargs), "PrivateUse1")
    all_of_it.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # bf16 is not simulated
    factories = torch.library.Library("aten", "IMPL")  # composites that would resize an empty tensor through out=
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(aten, packet), overload or "default")
        factories.impl(name, lambda *args, _op=operator, **kwargs: _dispatch(_op, args, kwargs), "PrivateUse1")
    return all_of_it, factories


def pretended_device() -> torch.device:
    """Returns the device, registered once per process. Parameters keep their identity in ``Module.to``, as on CUDA."""
    _libraries()
    torch.__future__.set_swap_module_params_on_conversion(True)
    # a Python exception out of a saved-tensor hook ends the process in the device's thread (torch 2.13)
    torch.utils.checkpoint._enable_checkpoint_early_stop = False  # type: ignore[attr-defined] # not public
    return torch.device(NAME, 0)
