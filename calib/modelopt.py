"""Starting scales by nvidia-modelopt's own calibrators: one activation scale for all timesteps.

Its SmoothQuant (arXiv 2211.10438) moves part of an activation's range into the weights of linear layers.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from s2p_deploy.calib.samples import samples_at
from s2p_deploy.calib.starting_scales import activation_format
from s2p_deploy.errors import InputError
from s2p_deploy.families import SmoothedLinear, module_of_type
from s2p_deploy.numerics import format_by_name, weight_scale_shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from s2p_deploy.context import Progress
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.numerics import IntegerFormat
    from s2p_deploy.records import LatentDataset, PrecisionPlan

_SMALLEST = torch.finfo(torch.float32).tiny ** 0.5  # an activation that is always zero still needs a scale
_SMOOTHED = ".layer"


@dataclass(frozen=True)
class ModeloptScales:
    """Peaks and smoothing factors from modelopt, by the layer's path before smoothing (no ``.layer`` at its end).

    ``weight_peaks`` float32 [out, 1, ...] and ``act_peaks`` float32 scalars are the largest magnitudes: of the weights
    and inputs after smoothing, where a layer was smoothed. ``smoothing`` float32 [in] holds the factors of linears that
    compute ``(x / factor) @ (W * factor).T``; it is empty without SmoothQuant.
    """

    weight_peaks: dict[str, Tensor]
    act_peaks: dict[str, Tensor]
    smoothing: dict[str, Tensor]

    def weight_scales(self, plan: PrecisionPlan) -> dict[str, Tensor]:
        """Computes weight scales float32 [out, 1, ...] of a plan whose linears may be smoothed by now."""
        formats = {layer.name: format_by_name(layer.weights) for layer in plan.layers}
        return {name: _scale(self.weight_peaks[_plain(name)], fmt) for name, fmt in formats.items() if fmt is not None}

    def act_scales(self, plan: PrecisionPlan, timesteps: int) -> Tensor:
        """Computes activation scales float32 [timesteps, quantizers], each from the largest of its layers' peaks."""
        peaks = (
            torch.stack([self.act_peaks[_plain(layer)] for layer in quantizer.layers]).max()
            for quantizer in plan.activation_quantizers
        )
        scales = [
            _scale(peak, activation_format(each)) for peak, each in zip(peaks, plan.activation_quantizers, strict=True)
        ]
        return torch.stack(scales).repeat(timesteps, 1) if scales else torch.zeros(timesteps, 0)


def smoothed_layers(plan: PrecisionPlan) -> tuple[str, ...]:
    """Lists the layers that SmoothQuant smooths: linears with quantized weights and activations, by their plain paths.

    ``plan`` is of the denoiser before smoothing.
    """
    quantized = (layer for layer in plan.layers if layer.weights != "none" and layer.activation_quantizer is not None)
    return tuple(layer.name for layer in quantized if layer.op == "linear")


def set_smoothing(denoiser: IndexedDenoiser, factors: Mapping[str, Tensor]) -> None:
    """Gives smoothed layers their factors float32 [in]; what the layers compute stays the same.

    Raises:
        InputError: a path is no smoothed layer, or its factor has another shape, or is not finite and above zero.
    """
    for path, factor in factors.items():
        module = module_of_type(denoiser, path, SmoothedLinear)
        if factor.shape != module.factor.shape or not (torch.isfinite(factor) & (factor > 0)).all():
            raise InputError(
                f"smoothing factor of {path} must be {module.factor.numel()} finite numbers above zero,"
                f" got {list(factor.shape)} with minimum {float(factor.min())}"
            )
        module.set_factor(factor.to(module.factor))


def modelopt_scales(
    denoiser: IndexedDenoiser,
    plan: PrecisionPlan,
    dataset: LatentDataset,
    calibrator: Literal["modelopt", "modelopt_smoothquant"],
    progress: Progress,
    samples_per_call: int | None = None,
) -> ModeloptScales:
    """Runs nvidia-modelopt's INT8 default or SmoothQuant configuration over all stored latents, both CFG branches.

    In calls of ``samples_per_call`` (None: of a few).

    It works on a copy: ``denoiser``, the floating-point denoiser before smoothing, stays as it is. Quantizers of
    exactly the plan's layers are on; modelopt's own list of layers to leave out is made for language models and would
    drop every ``proj_out``. Bits are its 8 throughout, because peaks do not depend on them and it smooths no INT4
    weights; the plan's formats decide what the peaks are divided by.

    Raises:
        InputError: modelopt refuses the activations, which are not finite then.
    """
    model = copy.deepcopy(denoiser).requires_grad_(requires_grad=False)
    with _quiet():
        import modelopt.torch.quantization as mtq

        stock = mtq.INT8_DEFAULT_CFG if calibrator == "modelopt" else mtq.INT8_SMOOTHQUANT_CFG
        config = stock | {"quant_cfg": [*stock["quant_cfg"], *_switches(plan)]}
        try:
            mtq.quantize(model, config, lambda copied: _show(copied, dataset, progress, samples_per_call))
        except AssertionError as error:
            raise InputError(
                f"nvidia-modelopt found an activation that is not finite ({error}), though every weight is: the"
                " scheduler's configuration does not suit the network"
            ) from error
    return _read(model, plan)


def _switches(plan: PrecisionPlan) -> Iterator[dict[str, Any]]:
    yield {"quantizer_name": "*", "enable": False}
    for layer in plan.layers:
        path = f"network.{_plain(layer.name)}"
        if layer.weights != "none":
            yield {"quantizer_name": f"{path}.weight_quantizer", "enable": True}
        if layer.activation_quantizer is not None:
            yield {"quantizer_name": f"{path}.input_quantizer", "enable": True}


@torch.no_grad()
def _show(model: IndexedDenoiser, dataset: LatentDataset, progress: Progress, samples_per_call: int | None) -> None:
    pairs = samples_at(dataset, np.arange(len(dataset.timestep_indices)))
    done = 0
    for which in pairs.batches(samples_per_call):
        model(*(argument.to(model.device) for argument in pairs.inputs(which)))
        done += len(which)
        progress("modelopt", done, len(pairs.sample))


def _read(model: IndexedDenoiser, plan: PrecisionPlan) -> ModeloptScales:
    weight_peaks, act_peaks, smoothing = {}, {}, {}
    for layer in plan.layers:
        name = _plain(layer.name)
        module: Any = model.network.get_submodule(name)
        if layer.weights != "none":
            peaks = module.weight_quantizer.amax.detach().float().cpu()
            weight_peaks[name] = peaks.view(weight_scale_shape(module.weight))
        if layer.activation_quantizer is not None:
            act_peaks[name] = module.input_quantizer.amax.detach().float().cpu()
            if module.input_quantizer.pre_quant_scale is not None:
                smoothing[name] = 1 / module.input_quantizer.pre_quant_scale.detach().float().cpu()
    return ModeloptScales(weight_peaks, act_peaks, smoothing)


def _scale(peak: Tensor, fmt: IntegerFormat) -> Tensor:
    return peak.clamp_min(_SMALLEST) / fmt.qmax


def _plain(layer: str) -> str:
    return layer.removesuffix(_SMOOTHED)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences modelopt's prints and its warnings about layers that the plan keeps in floating point."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
