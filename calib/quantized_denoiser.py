"""The fake-quantized denoiser in PyTorch: what is trained, and what every engine is compared with.

A sample's row is data. Its scales go to the sites as arguments of the call (``torch.func.functional_call``), so samples
of one batch sit on different rows and nothing is left behind in a module.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.families import (
    HotDenoiser,
    apply_transforms,
    hot_denoiser_of,
    load_pipeline,
    new_hot_denoiser,
)
from s2p_deploy.numerics import INT10, IntegerFormat, fake_quantize, format_by_name, quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records import CalibratedModel, PrecisionPlan, Simulation, SitePlan

Result = TypeVar("Result")


@dataclass(frozen=True)
class SampleGrids:
    """The activation grids of a batch: each sample's own row.

    ``scales`` float32 [batch, points]. In simulation only: ``offsets`` float32 [batch, points], the value of code 0,
    and ``relaxed`` bool [batch], samples whose activations have 10 bits.
    """

    scales: Tensor
    offsets: Tensor | None = None
    relaxed: Tensor | None = None


class InputQuantizer(nn.Module):
    """Fake-quantizes a site's input, one grid per sample; the grid's tensors [batch] exist only during a call."""

    act_scale: Tensor | None
    act_offset: Tensor | None
    act_relaxed: Tensor | None

    def __init__(self, site: str, fmt: IntegerFormat) -> None:
        super().__init__()
        self.site, self.fmt = site, fmt
        for name in ("act_scale", "act_offset", "act_relaxed"):
            self.register_buffer(name, None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [batch, ...] on its own sample's grid. Raises S2PError where the call brought no scale."""
        if self.act_scale is None:
            raise S2PError(
                f"site {self.site} was reached without an activation scale: call the QuantizedDenoiser, not its parts"
            )
        scale = _per_sample(self.act_scale, x)
        if self.act_offset is None:
            return self._on_grid(x, scale)
        offset = _per_sample(self.act_offset, x)
        return self._on_grid(x - offset, scale) + offset

    def _on_grid(self, x: Tensor, scale: Tensor) -> Tensor:
        on_grid = fake_quantize(x, scale, self.fmt)
        if self.act_relaxed is None:
            return on_grid
        return torch.where(_per_sample(self.act_relaxed, x), fake_quantize(x, scale, INT10), on_grid)

    def codes(self, x: Tensor, act_scale: Tensor) -> Tensor:
        """Integer codes (as floats) of ``x`` [batch, ...] under the scales ``act_scale`` float32 [batch]."""
        return quantize(x, _per_sample(act_scale, x), self.fmt)


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
        """The weight on its grid."""
        return fake_quantize(weight, self.scale, self.fmt)


class QuantizedConv2d(nn.Conv2d):
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
        self.input_quantizer, self.weight_quantizer = input_quantizer, weight_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Convolution of the quantized input with the quantized weight."""
        output: Tensor = self._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)
        return output


class QuantizedLinear(nn.Linear):
    """A linear layer whose input and weight pass a quantizer (``nn.Identity`` where they stay in floating point)."""

    def __init__(self, linear: nn.Linear, input_quantizer: nn.Module, weight_quantizer: nn.Module) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.input_quantizer, self.weight_quantizer = input_quantizer, weight_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Product of the quantized input with the quantized weight."""
        return nn.functional.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantizedDenoiser(nn.Module):
    """A hot denoiser (changed in place) whose planned sites are quantized.

    ``weight_scales`` float32 [out, 1, ...] by site. With ``bake`` the weights are put on their grid once, for a model
    that is not trained any more: the same values, faster.
    """

    def __init__(
        self, hot: HotDenoiser, plan: PrecisionPlan, weight_scales: Mapping[str, Tensor], *, bake: bool = False
    ) -> None:
        super().__init__()
        self.hot, self.plan = hot, plan
        for site in plan.sites:
            _replace(
                hot,
                site,
                _quantized(hot.network.get_submodule(site.site), site, plan, weight_scales.get(site.site), bake=bake),
            )
        self._columns = {
            f"hot.network.{name}.input_quantizer": column
            for column, point in enumerate(plan.act_points)
            for name in point.sites
        }

    def forward(
        self,
        sample: Tensor,
        step_index: Tensor,
        encoder_hidden_states: Tensor,
        added_cond: Tensor | None,
        grids: SampleGrids,
    ) -> Tensor:
        """The network's raw output [batch, C, H, W].

        Args:
            sample: float32 [batch, C, H, W] latents after ``scale_model_input``.
            step_index: int64 [batch] row of each sample.
            encoder_hidden_states: float32 [batch, tokens, D] text states.
            added_cond: float32 [batch, A], not read where A is 0.
            grids: activation grids of each sample, already looked up.
        """
        output: Tensor = self.within(grids, lambda hot: hot(sample, step_index, encoder_hidden_states, added_cond))
        return output

    def within(self, grids: SampleGrids, function: Callable[[HotDenoiser], Result]) -> Result:
        """``function(hot)``, during which the sites have the samples' grids.

        A backward pass that recomputes activations (checkpointing) has to run inside too.
        """
        arguments: dict[str, Tensor] = {}
        for name, column in self._columns.items():
            arguments[f"{name}.act_scale"] = grids.scales[:, column]
            if grids.offsets is not None:
                arguments[f"{name}.act_offset"] = grids.offsets[:, column]
            if grids.relaxed is not None:
                arguments[f"{name}.act_relaxed"] = grids.relaxed
        result: Result = torch.func.functional_call(_Call(self.hot), arguments, (function,))
        return result

    def site(self, name: str) -> nn.Module:
        """The module of a site; its forward input is the activation before quantization."""
        module: nn.Module = self.hot.network.get_submodule(name)
        return module

    def hot_state(self) -> dict[str, Tensor]:
        """Parameters and buffers under the hot denoiser's own names, without the quantizers'."""
        return {
            name: value
            for name, value in self.hot.state_dict().items()
            if not name.endswith("weight_quantizer.log_scale")
        }

    def weight_scales(self) -> dict[str, Tensor]:
        """The scales float32 [out, 1, ...] of the sites whose weights are still being trained."""
        found = {site.site: self.site(site.site).weight_quantizer for site in self.plan.sites if site.weights != "none"}
        return {
            name: quantizer.scale.detach()
            for name, quantizer in found.items()
            if isinstance(quantizer, WeightQuantizer)
        }


class _Call(nn.Module):
    """Calls a function of a denoiser as a module's forward pass, which is what ``functional_call`` can wrap."""

    def __init__(self, hot: HotDenoiser) -> None:
        super().__init__()
        self.hot = hot

    def forward(self, function: Callable[[HotDenoiser], Result]) -> Result:
        return function(self.hot)


class FakeQuantDenoiser(nn.Module):
    """A finished quantized denoiser with its tables bound: the reference that engines are compared with.

    ``act_scales`` float32 [rows, points]; ``simulation`` has what no engine can do, where the model is of that kind.
    """

    act_scales: Tensor
    act_offsets: Tensor | None
    relaxed_rows: Tensor | None

    def __init__(self, denoiser: QuantizedDenoiser, act_scales: Tensor, simulation: Simulation | None = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        offsets = relaxed = None
        if simulation is not None:
            offsets = torch.from_numpy(simulation.offsets)
            relaxed = torch.zeros(len(act_scales), dtype=torch.bool)
            relaxed[list(simulation.relaxed)] = True
        self.register_buffer("act_scales", act_scales, persistent=False)
        self.register_buffer("act_offsets", offsets, persistent=False)
        self.register_buffer("relaxed_rows", relaxed, persistent=False)

    def forward(
        self, sample: Tensor, step_index: Tensor, encoder_hidden_states: Tensor, added_cond: Tensor | None = None
    ) -> Tensor:
        """The network's raw output [batch, C, H, W]; arguments as :meth:`HotDenoiser.forward`."""
        grids = SampleGrids(
            self.act_scales[step_index],
            None if self.act_offsets is None else self.act_offsets[step_index],
            None if self.relaxed_rows is None else self.relaxed_rows[step_index],
        )
        output: Tensor = self.denoiser(sample, step_index, encoder_hidden_states, added_cond, grids)
        return output

    def site(self, name: str) -> nn.Module:
        """The module of a site; its forward input is the activation before quantization."""
        return self.denoiser.site(name)

    def site_scale(self, name: str, step_index: Tensor) -> Tensor | None:
        """The activation scales float32 [batch] of a site on some rows, or None where it stays in floating point."""
        plan = self.denoiser.plan
        point = next(site.act_point for site in plan.sites if site.site == name)
        return None if point is None else self.act_scales[step_index, plan.point_names().index(point)]


def fake_quant_denoiser(calibrated: CalibratedModel) -> FakeQuantDenoiser:
    """The fake-quant reference of a calibrated model, in evaluation mode, float32 on the CPU; the FP model for fp."""
    config = json.loads((calibrated.folder / "denoiser_config.json").read_text(encoding="utf-8"))
    hot = new_hot_denoiser(config, calibrated.time_source())
    apply_transforms(hot, calibrated.transforms)
    hot.load_state_dict({name: torch.from_numpy(value) for name, value in calibrated.weights().items()})
    scales = {name: torch.from_numpy(value) for name, value in calibrated.weight_scales().items()}
    denoiser = QuantizedDenoiser(hot, calibrated.plan, scales, bake=True)
    return (
        FakeQuantDenoiser(denoiser, torch.from_numpy(calibrated.scales.scales), calibrated.simulation)
        .eval()
        .requires_grad_(requires_grad=False)
    )


def fp_denoiser(base: BasePipeline, steps: int) -> HotDenoiser:
    """The floating-point hot denoiser of a pipeline, in evaluation mode, float32 on the CPU.

    Its rows are those of ``steps`` of the pipeline's scheduler. Raises InputError where that has no such schedule.
    """
    return hot_denoiser_of(load_pipeline(base), steps).eval().requires_grad_(requires_grad=False)


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    height, width = sizes
    return height, width


def _per_sample(scale: Tensor, x: Tensor) -> Tensor:
    return scale.view(-1, *(1,) * (x.dim() - 1))


def _quantized(
    module: nn.Module, site: SitePlan, plan: PrecisionPlan, scale: Tensor | None, *, bake: bool
) -> nn.Module:
    if not isinstance(module, nn.Conv2d | nn.Linear):
        kind = type(module).__name__
        raise InputError(f"site {site.site} is a {kind}, not a Conv2d or Linear: the plan is of another denoiser")
    inputs = _input_quantizer(site, plan)
    weights: nn.Module = nn.Identity()
    fmt = format_by_name(site.weights)
    if fmt is not None:
        if scale is None:
            raise InputError(f"site {site.site} has {site.weights} weights in the plan and no weight scale")
        if bake:
            module.weight = nn.Parameter(fake_quantize(module.weight.detach(), scale, fmt))
        else:
            weights = WeightQuantizer(scale, fmt)
    if isinstance(module, nn.Conv2d):
        return QuantizedConv2d(module, inputs, weights)
    return QuantizedLinear(module, inputs, weights)


def _input_quantizer(site: SitePlan, plan: PrecisionPlan) -> nn.Module:
    if site.act_point is None:
        return nn.Identity()
    fmt = format_by_name(plan.point(site.act_point).activations)
    return nn.Identity() if fmt is None else InputQuantizer(site.site, fmt)


def _replace(hot: HotDenoiser, site: SitePlan, module: nn.Module) -> None:
    parent, _, leaf = site.site.rpartition(".")
    hot.network.get_submodule(parent).register_module(leaf, module)
