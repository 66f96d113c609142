"""Rewrites of a denoiser's modules (split shortcuts, smoothing, shifts), exact in floating point."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
from torch import nn

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from s2p_deploy.families.indexed_denoiser import IndexedDenoiser
    from s2p_deploy.records import TransformSpec

Kind = TypeVar("Kind", bound=nn.Module)


class SplitConv2d(nn.Module):
    """A convolution over cat(h, skip) as the sum of two, so that each half has its own grid (Q-Diffusion, 2302.04304).

    ``head`` reads the ``leading`` input channels and owns the bias; ``skip`` reads the others.
    """

    def __init__(self, conv: nn.Conv2d, leading: int) -> None:
        super().__init__()
        self.leading = leading
        weight = conv.weight.detach()
        self.head = _over(conv, weight[:, :leading], conv.bias)
        self.skip = _over(conv, weight[:, leading:], None)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [batch, in, height, width]."""
        output: Tensor = self.head(x[:, : self.leading]) + self.skip(x[:, self.leading :])
        return output


class SmoothedLinear(nn.Module):
    """A linear layer behind a division per input channel: ``layer(x / factor)`` (SmoothQuant, 2211.10438).

    ``factor`` [in] starts at one; the weight of ``layer`` holds what was there times ``factor``.
    """

    factor: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("factor", layer.weight.detach().new_ones(layer.in_features))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] to [..., out]."""
        output: Tensor = self.layer(x / self.factor)
        return output

    def plain_weight(self) -> Tensor:
        """Computes the weight [out, in] that the layer would have without smoothing."""
        return self.layer.weight.detach() / self.factor

    @torch.no_grad()
    def set_factor(self, factor: Tensor) -> None:
        """Sets another ``factor`` [in], finite and above zero; the layer computes what it computed."""
        self.layer.weight.mul_(factor / self.factor)
        self.factor.copy_(factor)


class ShiftedLayer(nn.Module):
    """A layer behind a subtraction per input channel: ``layer(x - shift)``, with the product of ``shift`` in its bias.

    What lies around zero behind a SiLU, say, lies in the middle of a symmetric grid then. ``shift`` [in] starts at
    zero. A convolution's input is padded before the subtraction, so that its border stays exact.
    """

    shift: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.register_buffer("shift", weight.new_zeros(weight.shape[1]))
        if layer.bias is None:
            layer.bias = nn.Parameter(weight.new_zeros(len(weight)))
        self.padding: tuple[int, ...] = ()
        if isinstance(layer, nn.Conv2d) and any(layer.padding):
            height, width = (int(size) for size in layer.padding)
            self.padding, layer.padding = (width, width, height, height), (0, 0)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [batch, in, height, width], or [..., in] of a linear layer."""
        if self.padding:
            x = nn.functional.pad(x, self.padding)
        trailing = (1,) * (self.layer.weight.dim() - 2)
        output: Tensor = self.layer(x - self.shift.view(-1, *trailing))
        return output

    @torch.no_grad()
    def set_shift(self, shift: Tensor) -> None:
        """Sets another ``shift`` [in]; the layer computes what it computed."""
        assert self.layer.bias is not None, "the constructor gave it one"
        self.layer.bias.add_(product_with_shift(self.layer.weight, shift - self.shift))
        self.shift.copy_(shift)


@torch.no_grad()
def set_norm_shift(denoiser: IndexedDenoiser, path: str, readers: Sequence[str], shift: Tensor) -> None:
    """Subtracts ``shift`` [channels] in a norm's bias, in place of the last one; its readers compute what they did."""
    norm = denoiser.network.get_submodule(path)
    change = shift - norm.shift
    norm.bias.sub_(change)
    norm.shift.copy_(shift)
    for reader in readers:
        layer = denoiser.network.get_submodule(reader)
        layer.bias.add_(product_with_shift(layer.weight, change))


def product_with_shift(weight: Tensor, shift: Tensor) -> Tensor:
    """Computes a layer's output [out] for an input that is ``shift`` [in] everywhere; ``weight`` [out, in, ...]."""
    rows = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    return (rows * shift).sum(1)  # no matrix product, which autocast would round to half precision


def shifts_by_layer(denoiser: IndexedDenoiser, spec: TransformSpec) -> dict[str, Tensor]:
    """Returns what the inputs of layers lost [in], by the layers' own names in the transformed ``denoiser``."""
    return {layer: denoiser.network.get_submodule(path).shift for layer, path in shifted_layers(spec).items()}


def shifted_layers(spec: TransformSpec) -> dict[str, str]:
    """Lists the layers whose inputs lose a shift, each with the module that has it: around it, or its norm."""
    readers = {reader: norm for norm, names in spec.shifted_norms.items() for reader in names}
    return {f"{path}.layer": path for path in spec.shifted} | readers


def shiftable(layer: nn.Module) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Tells whether a layer can be a :class:`ShiftedLayer`: a Linear, or a Conv2d without groups, padded by zeros."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def apply_transforms(denoiser: IndexedDenoiser, spec: TransformSpec) -> None:
    """Rewrites the modules of ``denoiser`` in place as ``spec`` says, without changing what it computes.

    Raises:
        InputError: a path is not in the denoiser or of another kind, or a split does not fit its layer.
    """
    for path, leading in spec.split.items():
        conv = module_of_type(denoiser, path, nn.Conv2d)
        if not 0 < leading < conv.in_channels or conv.groups != 1:
            raise InputError(
                f"transform: {path} cannot be split after {leading} of {conv.in_channels} input channels"
                f" in {conv.groups} group(s): the transforms are of another denoiser"
            )
        put_module(denoiser, path, SplitConv2d(conv, leading))
    for path in spec.smoothed:
        put_module(denoiser, path, SmoothedLinear(module_of_type(denoiser, path, nn.Linear)))
    for path in spec.shifted:
        layer = module_of_type(denoiser, path, nn.Module)
        if not shiftable(layer):
            raise InputError(f"transform: {path} cannot be shifted: the transforms are of another denoiser")
        put_module(denoiser, path, ShiftedLayer(layer))
    for path, readers in spec.shifted_norms.items():
        _prepare_norm(denoiser, path, readers)


def _prepare_norm(denoiser: IndexedDenoiser, path: str, readers: Sequence[str]) -> None:
    """Gives a norm a shift, of zero, and its readers the biases that keep their outputs."""
    norm = module_of_type(denoiser, path, nn.Module)
    layers = [module_of_type(denoiser, reader, nn.Module) for reader in readers]
    if not has_bias(norm) or hasattr(norm, "shift") or not all(map(unpadded, layers)):
        raise InputError(f"transform: {path} cannot be shifted: the transforms are of another denoiser")
    norm.register_buffer("shift", torch.zeros_like(norm.bias, requires_grad=False))
    for layer in layers:
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.detach().new_zeros(len(layer.weight)))


def has_bias(module: nn.Module) -> TypeGuard[nn.LayerNorm | nn.GroupNorm]:
    """Tells whether a module is a norm that ends with the addition of a bias per channel."""
    return isinstance(module, nn.LayerNorm | nn.GroupNorm) and module.bias is not None


def unpadded(layer: nn.Module) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Tells whether every output of a layer that :func:`shiftable` takes sees its input alone, and no border."""
    return shiftable(layer) and not (isinstance(layer, nn.Conv2d) and any(layer.padding))


def module_of_type(denoiser: IndexedDenoiser, path: str, kind: type[Kind]) -> Kind:
    """Returns the module of a path that a transform names. Raises InputError where there is none of that kind."""
    try:
        module = denoiser.network.get_submodule(path)
    except AttributeError as error:
        raise InputError(f"transform: {path} is not in this denoiser: the transforms are of another one") from error
    if not isinstance(module, kind):
        raise InputError(
            f"transform: {path} is a {type(module).__name__}, not a {kind.__name__}:"
            " the transforms are of another denoiser, or already there"
        )
    return module


def _over(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """Copies ``conv`` with another weight [out, in, kernel height, kernel width] and bias."""
    part = copy.deepcopy(conv)
    part.in_channels = weight.shape[1]
    part.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    part.bias = bias  # the parameter itself, or none
    return part


def put_module(denoiser: IndexedDenoiser, path: str, module: nn.Module) -> None:
    """Replaces the module of a path in the network."""
    parent, _, leaf = path.rpartition(".")
    denoiser.network.get_submodule(parent).register_module(leaf, module)
