"""The fake-quantized denoiser in PyTorch: what is trained, and what every engine is compared with.

A sample's timestep index is data. Its scales go to the layers as arguments of the call
(``torch.func.functional_call``), so samples of one batch may have different timesteps, and no module keeps a state
between calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.families import (
    IndexedDenoiser,
    apply_transforms,
    indexed_denoiser_of,
    load_pipeline,
    new_indexed_denoiser,
    product_with_shift,
)
from s2p_deploy.numerics import IntegerFormat, fake_quantize, format_by_name, quantize
from s2p_deploy.records.calibrated_model import parameter_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records import CalibratedModel, LayerPlan, PrecisionPlan

Result = TypeVar("Result")


def weight_format(layer: LayerPlan) -> IntegerFormat | None:
    """Returns the integer format of a layer's weights, or None where they stay in floating point."""
    return format_by_name(layer.weights)


class InputQuantizer(nn.Module):
    """Fake-quantizes the input of a layer, or of neighbors that read one tensor, each sample on its own grid.

    ``act_scale`` float32 [batch] exists only during a call. Another grid (a hook of :class:`Hooks`) may have [batch, n]
    numbers in its place. ``readers`` layers share the result, so that q, k and v of an attention keep one copy of it.
    """

    act_scale: Tensor | None

    def __init__(self, layer: str, fmt: IntegerFormat) -> None:
        super().__init__()
        self.name, self.fmt = layer, fmt
        self.readers = 0
        self._left = 0  # readers of what is kept
        self._kept: tuple[Tensor, Tensor] | None = None  # an input, and its values on the grid
        self.register_buffer("act_scale", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Puts ``x`` [batch, ...] on its samples' grids. Raises S2PError where the call brought no scale."""
        if self.act_scale is None:
            raise S2PError(
                f"layer {self.name} was reached without an activation scale: call the QuantizedDenoiser, not its parts"
            )
        if self._kept is None or self._kept[0] is not x:
            self._kept, self._left = (x, self.on_grid(x, self.act_scale)), self.readers
        result = self._kept[1]
        self._left -= 1
        if self._left == 0:
            self.forget()
        return result

    def forget(self) -> None:
        """Drops what is kept for readers that did not come."""
        self._kept = None

    def on_grid(self, x: Tensor, act_scale: Tensor) -> Tensor:
        """Fake-quantizes ``x`` [batch, ...] under ``act_scale`` float32 [batch]."""
        return fake_quantize(x, per_sample(act_scale, x), self.fmt)

    def codes(self, x: Tensor, act_scale: Tensor) -> Tensor:
        """Quantizes ``x`` [batch, ...] to integer codes (as floats) under ``act_scale`` float32 [batch]."""
        return quantize(x, per_sample(act_scale, x), self.fmt)


class WeightQuantizer(nn.Module):
    """Fake-quantizes a weight with one trained scale per output channel, kept as its logarithm [out, 1, ...]."""

    def __init__(self, scale: Tensor, fmt: IntegerFormat) -> None:
        super().__init__()
        self.fmt = fmt
        self.log_scale = nn.Parameter(scale.log())

    @property
    def scale(self) -> Tensor:
        """float32 [out, 1, ...]."""
        return self.log_scale.exp()

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight on its grid."""
        return fake_quantize(weight, self.scale, self.fmt)


def product_of_rounding(weight: Tensor, scale: Tensor, fmt: IntegerFormat, shift: Tensor) -> Tensor:
    """Computes what rounding a ``weight`` [out, in, ...] adds to its product [out] with ``shift`` [in]."""
    return product_with_shift(fake_quantize(weight, scale, fmt), shift) - product_with_shift(weight, shift)


class _OnGrid(nn.Module):
    """What quantized layers of both kinds have: quantizers, and a bias that follows the weight's codes.

    Where the input lost a ``shift`` k [in], the bias holds a ``product`` with it. Of the codes it must be that of the
    codes: with W k there, what rounding does to W would be multiplied by x - k, not by x, and k is larger than most x.
    """

    shift: Tensor | None
    product: Tensor | None

    def _set_quantizers(self, module: nn.Module, input_quantizer: nn.Module, weight_quantizer: nn.Module) -> None:
        self.input_quantizer, self.weight_quantizer = input_quantizer, weight_quantizer
        for name in ("shift", "product"):
            self.register_buffer(name, getattr(module, name) if isinstance(module, _OnGrid) else None, persistent=False)

    def follow_shift(self, shift: Tensor, weight: Tensor) -> None:
        """Lets the bias, which holds the product of ``weight`` with ``shift``, hold that of the codes from now on."""
        self.shift, self.product = shift, product_with_shift(weight.detach(), shift)

    def on_grid(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the layer's weight on its grid, and the bias that goes with it."""
        weight = self.weight_quantizer(weight)
        if self.shift is None or self.product is None or bias is None:
            return weight, bias
        return weight, bias + (product_with_shift(weight, self.shift) - self.product)


class QuantizedConv2d(_OnGrid, nn.Conv2d):
    """A convolution whose input and weight pass a quantizer (``nn.Identity`` where they stay in floating point)."""

    def __init__(self, conv: nn.Conv2d, input_quantizer: nn.Module, weight_quantizer: nn.Module) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            _pair(conv.kernel_size),
            _pair(conv.stride),
            conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),
            _pair(conv.dilation),
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self._set_quantizers(conv, input_quantizer, weight_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """Convolution of the quantized input with the quantized weight."""
        output: Tensor = self._conv_forward(self.input_quantizer(x), *self.on_grid(self.weight, self.bias))
        return output


class QuantizedLinear(_OnGrid, nn.Linear):
    """A linear layer whose input and weight pass a quantizer (``nn.Identity`` where they stay in floating point)."""

    def __init__(self, linear: nn.Linear, input_quantizer: nn.Module, weight_quantizer: nn.Module) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._set_quantizers(linear, input_quantizer, weight_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """Product of the quantized input with the quantized weight."""
        return nn.functional.linear(self.input_quantizer(x), *self.on_grid(self.weight, self.bias))


class QuantizedDenoiser(nn.Module):
    """An indexed denoiser (changed in place) whose planned layers are quantized.

    Args:
        inner: the floating-point denoiser.
        plan: formats of its layers.
        weight_scales: float32 [out, 1, ...] by layer.
        bake: puts the weights on their grid once, for a model that is not trained any more: the same values, faster.
        weight_format: the integer format of a layer's weights.
        input_quantizer: quantizes a layer's input.
    """

    def __init__(
        self,
        inner: IndexedDenoiser,
        plan: PrecisionPlan,
        weight_scales: Mapping[str, Tensor],
        *,
        bake: bool = False,
        weight_format: Callable[[LayerPlan], IntegerFormat | None] = weight_format,
        input_quantizer: Callable[[str, IntegerFormat], InputQuantizer] = InputQuantizer,
    ) -> None:
        super().__init__()
        self.inner, self.plan = inner, plan
        self._input_quantizers: dict[tuple[str, str], InputQuantizer] = {}  # by activation quantizer and parent module
        for layer in plan.layers:
            module = inner.network.get_submodule(layer.name)
            if not isinstance(module, nn.Conv2d | nn.Linear):
                raise InputError(
                    f"layer {layer.name} is a {type(module).__name__}, not a Conv2d or Linear:"
                    " the plan is of another denoiser"
                )
            parent, _, leaf = layer.name.rpartition(".")
            inputs = self._input_quantizer(layer, parent, input_quantizer)
            weights = _weight_quantizer(module, layer, weight_format(layer), weight_scales.get(layer.name), bake=bake)
            quantized = (
                QuantizedConv2d(module, inputs, weights)
                if isinstance(module, nn.Conv2d)
                else QuantizedLinear(module, inputs, weights)
            )
            inner.network.get_submodule(parent).register_module(leaf, quantized)
        column = {name: number for number, name in enumerate(plan.quantizer_names())}
        self._columns = {
            f"inner.network.{quantizer.name}.input_quantizer": column[name]
            for (name, _), quantizer in self._input_quantizers.items()
        }

    def _input_quantizer(
        self, layer: LayerPlan, parent: str, make: Callable[[str, IntegerFormat], InputQuantizer]
    ) -> nn.Module:
        """Makes the input quantizer of a layer, or finds that of its neighbors.

        Blocks do not share theirs, though all read one text: checkpointing recomputes each block by itself.
        """
        name = layer.activation_quantizer
        fmt = None if name is None else format_by_name(self.plan.quantizer(name).activations)
        if name is None or fmt is None:
            return nn.Identity()
        quantizer = self._input_quantizers.get((name, parent))
        if quantizer is None:
            quantizer = self._input_quantizers[name, parent] = make(layer.name, fmt)
        quantizer.readers += 1
        return quantizer

    def forward(
        self,
        sample: Tensor,
        timestep_index: Tensor,
        encoder_hidden_states: Tensor,
        added_cond: Tensor | None,
        act_scales: Tensor,
    ) -> Tensor:
        """Computes the network's raw output [batch, C, H, W].

        Args:
            sample: float32 [batch, C, H, W] latents after ``scale_model_input``.
            timestep_index: int64 [batch].
            encoder_hidden_states: float32 [batch, tokens, D] text states.
            added_cond: float32 [batch, A], not read where A is 0.
            act_scales: float32 [batch, quantizers], the scales of each sample's timestep.
        """
        output: Tensor = self.within(
            act_scales, lambda inner: inner(sample, timestep_index, encoder_hidden_states, added_cond)
        )
        return output

    def within(self, act_scales: Tensor, function: Callable[[IndexedDenoiser], Result]) -> Result:
        """Calls ``function(inner)``, during which the layers have the samples' activation scales.

        A backward pass that recomputes activations (checkpointing) has to run inside too.
        """
        arguments = {f"{name}.act_scale": act_scales[:, column] for name, column in self._columns.items()}
        try:
            result: Result = torch.func.functional_call(_Call(self.inner), arguments, (function,))
        finally:
            for quantizer in self._input_quantizers.values():
                quantizer.forget()
        return result

    def layer(self, name: str) -> nn.Module:
        """Returns the module of a layer; its forward input is the activation before quantization."""
        module: nn.Module = self.inner.network.get_submodule(name)
        return module

    @torch.no_grad()
    def follow_shifts(self, shifts: Mapping[str, Tensor], *, settled: bool) -> None:
        """Lets the biases of layers follow their weights' codes.

        Args:
            shifts: what the layers' inputs lost [in], by layer.
            settled: whether the biases hold the codes' products with it already, as those of a finished model do.
        """
        for name, shift in shifts.items():
            module = self.layer(name)
            assert isinstance(module, QuantizedConv2d | QuantizedLinear), "shifted layers are planned"
            module.follow_shift(shift, module.weight_quantizer(module.weight) if settled else module.weight)

    @torch.no_grad()
    def inner_state(self) -> dict[str, Tensor]:
        """Returns parameters and buffers under the indexed denoiser's own names, without the quantizers'.

        Biases of shifted layers are those that go with the codes.
        """
        state = {
            name: value
            for name, value in self.inner.state_dict().items()
            if not name.endswith("weight_quantizer.log_scale")
        }
        for layer in self.plan.layers:
            module = self.layer(layer.name)
            if isinstance(module, QuantizedConv2d | QuantizedLinear) and module.shift is not None:
                bias = module.on_grid(module.weight, module.bias)[1]
                assert bias is not None, "a shifted layer has one"
                state[parameter_name(f"{layer.name}.bias")] = bias
        return state

    def weight_scales(self) -> dict[str, Tensor]:
        """Returns the scales float32 [out, 1, ...] of the layers whose weights are not baked."""
        quantizers = {
            layer.name: self.layer(layer.name).weight_quantizer for layer in self.plan.layers if layer.weights != "none"
        }
        return {
            name: quantizer.scale.detach()
            for name, quantizer in quantizers.items()
            if isinstance(quantizer, WeightQuantizer)
        }


class _Call(nn.Module):
    """Calls a function of a denoiser as a module's forward pass, which is what ``functional_call`` can wrap."""

    def __init__(self, inner: IndexedDenoiser) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, function: Callable[[IndexedDenoiser], Result]) -> Result:
        return function(self.inner)


class FakeQuantDenoiser(nn.Module):
    """A finished quantized denoiser with its scales bound: the reference that engines are compared with.

    ``act_scales`` float32 [timesteps, quantizers].
    """

    act_scales: Tensor

    def __init__(self, denoiser: QuantizedDenoiser, act_scales: Tensor) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.register_buffer("act_scales", act_scales, persistent=False)

    @property
    def device(self) -> torch.device:
        """Returns the device of the weights."""
        return self.denoiser.inner.device

    def forward(
        self, sample: Tensor, timestep_index: Tensor, encoder_hidden_states: Tensor, added_cond: Tensor | None = None
    ) -> Tensor:
        """Computes the network's raw output [batch, C, H, W]; arguments as :meth:`IndexedDenoiser.forward`."""
        output: Tensor = self.denoiser(
            sample, timestep_index, encoder_hidden_states, added_cond, self.act_scales[timestep_index]
        )
        return output

    def layer(self, name: str) -> nn.Module:
        """Returns the module of a layer; its forward input is the activation before quantization."""
        return self.denoiser.layer(name)

    def layer_scale(self, name: str, timestep_index: Tensor) -> Tensor | None:
        """Looks up the activation scales float32 [batch] of a layer, or None where it stays in floating point."""
        plan = self.denoiser.plan
        quantizer = next(layer.activation_quantizer for layer in plan.layers if layer.name == name)
        return None if quantizer is None else self.act_scales[timestep_index, plan.quantizer_names().index(quantizer)]


def fake_quant_denoiser(calibrated: CalibratedModel) -> FakeQuantDenoiser:
    """Loads the fake-quant reference of a calibrated model, in evaluation mode, float32 on the CPU.

    Of recipe ``fp`` it is the floating-point model.

    Raises:
        InputError: the model is a comparison's, of a kind that no engine can run.
    """
    calibrated.require_deployable()
    config = calibrated.denoiser_config()
    inner = new_indexed_denoiser(config, calibrated.time_source())
    apply_transforms(inner, calibrated.transforms)
    inner.load_state_dict({name: torch.from_numpy(value) for name, value in calibrated.weights().items()})
    scales = {name: torch.from_numpy(value) for name, value in calibrated.weight_scales().items()}
    denoiser = QuantizedDenoiser(inner, calibrated.plan, scales, bake=True)
    reference = FakeQuantDenoiser(denoiser, torch.from_numpy(calibrated.scales.scales))
    return reference.eval().requires_grad_(requires_grad=False)


def fp_denoiser(base: BasePipeline, steps: int) -> IndexedDenoiser:
    """Loads the floating-point indexed denoiser of a pipeline, in evaluation mode, float32 on the CPU.

    Its timesteps are those of ``steps`` of the pipeline's scheduler. Raises InputError where that has no such schedule.
    """
    return indexed_denoiser_of(load_pipeline(base), steps).eval().requires_grad_(requires_grad=False)


def per_sample(scale: Tensor, x: Tensor) -> Tensor:
    """Views scales [batch] as [batch, 1, ...], to broadcast against ``x`` [batch, ...]."""
    return scale.view(-1, *(1,) * (x.dim() - 1))


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    height, width = sizes
    return height, width


def _weight_quantizer(
    module: nn.Conv2d | nn.Linear, layer: LayerPlan, fmt: IntegerFormat | None, scale: Tensor | None, *, bake: bool
) -> nn.Module:
    """Makes the weight quantizer of a layer; where ``bake``, quantizes its weight in place."""
    if fmt is None:
        return nn.Identity()
    if scale is None:
        raise InputError(f"layer {layer.name} has {layer.weights} weights in the plan and no weight scale")
    if not bake:
        return WeightQuantizer(scale, fmt)
    module.weight = nn.Parameter(fake_quantize(module.weight.detach(), scale, fmt))
    return nn.Identity()
