"""Rewrites of a hot denoiser's modules: split shortcuts, smoothing, low-rank branches. All are exact when fresh."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.families.hot_denoiser import HotDenoiser
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


class LowRankLinear(nn.Module):
    """A linear layer with a floating-point branch beside it: ``residual(x) + up(down(x))`` (SVDQuant, 2411.05007).

    ``residual`` is the site and owns the bias; ``down`` [rank, in] and ``up`` [out, rank] start at zero.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.residual = linear
        self.down = _zero_linear(linear.in_features, rank, linear.weight)
        self.up = _zero_linear(rank, linear.out_features, linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] to [..., out]."""
        output: Tensor = self.residual(x) + self.up(self.down(x))
        return output

    def whole_weight(self) -> Tensor:
        """The weight [out, in] of the layer that branch and residual make together."""
        return self.residual.weight.detach() + self.up.weight.detach() @ self.down.weight.detach()

    @torch.no_grad()
    def decompose(self) -> None:
        """Moves the best approximation of the whole weight of this rank into the branch (by SVD, halves balanced)."""
        whole = self.whole_weight()
        left, values, right = torch.linalg.svd(whole.float(), full_matrices=False)
        rank = self.down.out_features
        root = values[:rank].sqrt()
        self.up.weight.copy_(left[:, :rank] * root)
        self.down.weight.copy_(root[:, None] * right[:rank])
        self.residual.weight.copy_(whole - self.up.weight @ self.down.weight)


class SmoothedLinear(nn.Module):
    """A linear layer behind a division per input channel: ``layer(x / factor)`` (SmoothQuant, 2211.10438).

    ``factor`` [in] starts at one; the weight of ``layer`` holds what was there times ``factor``.
    """

    factor: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("factor", layer.weight.detach().new_ones(layer.in_features))
        self.layer: nn.Linear | LowRankLinear = layer

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] to [..., out]."""
        output: Tensor = self.layer(x / self.factor)
        return output

    def plain_weight(self) -> Tensor:
        """The weight [out, in] that the layer would have without smoothing."""
        layer = self.layer
        weight = layer.whole_weight() if isinstance(layer, LowRankLinear) else layer.weight.detach()
        return weight / self.factor

    @torch.no_grad()
    def set_factor(self, factor: Tensor) -> None:
        """Takes another ``factor`` [in], finite and above zero; the layer computes what it computed."""
        layer = self.layer
        readers = (layer.residual, layer.down) if isinstance(layer, LowRankLinear) else (layer,)
        for reader in readers:
            reader.weight.mul_(factor / self.factor)
        self.factor.copy_(factor)


def apply_transforms(hot: HotDenoiser, spec: TransformSpec) -> None:
    """Rewrites the modules of ``hot`` in place as ``spec`` says; it computes what it computed. Works on any device.

    Raises:
        InputError: a path is not in the denoiser or of another kind, or a split or rank does not fit its layer.
    """
    for path, leading in spec.split.items():
        conv = module_of_kind(hot, path, nn.Conv2d)
        if not 0 < leading < conv.in_channels or conv.groups != 1:
            raise InputError(
                f"transform: {path} cannot be split after {leading} of {conv.in_channels} input channels"
                f" in {conv.groups} group(s): the transforms are of another denoiser"
            )
        _put(hot, path, SplitConv2d(conv, leading))
    for path in spec.smoothed:
        _put(hot, path, SmoothedLinear(module_of_kind(hot, path, nn.Linear)))
    for path, rank in spec.low_rank.items():
        linear = module_of_kind(hot, path, nn.Linear)
        if not 0 < rank <= min(linear.in_features, linear.out_features):
            raise InputError(
                f"transform: {path} has {linear.in_features} inputs and {linear.out_features} outputs,"
                f" too few for a branch of rank {rank}: choose a smaller transforms.low_rank"
            )
        _put(hot, path, LowRankLinear(linear, rank))


def module_of_kind(hot: HotDenoiser, path: str, kind: type[Kind]) -> Kind:
    """The module of a path that a transform names. Raises InputError where there is none of that kind."""
    try:
        module = hot.network.get_submodule(path)
    except AttributeError as error:
        raise InputError(f"transform: {path} is not in this denoiser: the transforms are of another one") from error
    if not isinstance(module, kind):
        raise InputError(
            f"transform: {path} is a {type(module).__name__}, not a {kind.__name__}:"
            " the transforms are of another denoiser, or already there"
        )
    return module


def _over(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """``conv`` with another weight [out, in, kernel height, kernel width] and bias."""
    part = copy.deepcopy(conv)
    part.in_channels = weight.shape[1]
    part.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    part.bias = bias  # the parameter itself, or none
    return part


def _zero_linear(inputs: int, outputs: int, like: Tensor) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")  # draws no random number
    linear.weight = nn.Parameter(like.detach().new_zeros(outputs, inputs))
    return linear


def _put(hot: HotDenoiser, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    hot.network.get_submodule(parent).register_module(leaf, module)
