"""Starting scales by nvidia-modelopt's own calibrators: one activation scale for all timesteps."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from s2p_deploy.calib.dataset.stored_points import points_at
from s2p_deploy.calib.quantization.scale_start import StartingGrids
from s2p_deploy.errors import S2PError
from s2p_deploy.numerics import format_by_name, weight_scale_shape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.numerics import IntegerFormat
    from s2p_deploy.progress import Progress
    from s2p_deploy.records import LatentDataset, PrecisionPlan

_SMALLEST = torch.finfo(torch.float32).tiny ** 0.5  # an activation that is always zero still needs a scale
_SMOOTHED = ".layer"


@dataclass(frozen=True)
class ModeloptStart:
    """What modelopt found, by the site's path in the denoiser before smoothing (no ``.layer`` at its end).

    ``weight_peaks`` float32 [out, 1, ...] and ``act_peaks`` float32 scalars are the largest magnitudes: of the weights
    and inputs after smoothing, where a site was smoothed. ``smoothing`` float32 [in] holds the factors of linears that
    compute ``(x / factor) @ (W * factor).T``; it is empty without SmoothQuant.
    """

    weight_peaks: dict[str, Tensor]
    act_peaks: dict[str, Tensor]
    smoothing: dict[str, Tensor]

    def weight_scales(self, plan: PrecisionPlan) -> dict[str, Tensor]:
        """Weight scales float32 [out, 1, ...] by the site names of ``plan``, whose linears may be smoothed by now."""
        formats = {site.site: format_by_name(site.weights) for site in plan.sites}
        return {name: _scale(self.weight_peaks[_plain(name)], fmt) for name, fmt in formats.items() if fmt is not None}

    def grids(self, plan: PrecisionPlan, rows: int) -> StartingGrids:
        """Grids of the points of ``plan``, equal in all ``rows``; a point takes the largest of its sites' peaks."""
        scales = []
        for point in plan.act_points:
            fmt = format_by_name(point.activations)
            assert fmt is not None, "act points are quantized"
            scales.append(_scale(torch.stack([self.act_peaks[_plain(site)] for site in point.sites]).max(), fmt))
        return StartingGrids(torch.stack(scales).repeat(rows, 1) if scales else torch.zeros(rows, 0))


def smoothed_by_modelopt(plan: PrecisionPlan) -> tuple[str, ...]:
    """The sites that SmoothQuant smooths: linears with quantized weights and activations, by their plain paths."""
    quantized = (site for site in plan.sites if site.weights != "none" and site.act_point is not None)
    return tuple(_plain(site.site) for site in quantized if site.op == "linear")


def modelopt_start(
    hot: HotDenoiser,
    plan: PrecisionPlan,
    dataset: LatentDataset,
    calibrator: Literal["modelopt", "modelopt_smoothquant"],
    progress: Progress,
) -> ModeloptStart:
    """Runs nvidia-modelopt's INT8 default or SmoothQuant configuration over all stored latents, both CFG branches.

    It works on a copy: ``hot``, the floating-point denoiser before smoothing, stays as it is. Quantizers of exactly the
    plan's sites are on; modelopt's own list of layers to leave out is made for language models and would drop every
    ``proj_out``. Bits are its 8 throughout, because peaks do not depend on them and it smooths no INT4 weights; the
    plan's formats decide what the peaks are divided by.

    Raises:
        S2PError: modelopt refuses the activations, which are not finite then.
    """
    model = copy.deepcopy(hot).requires_grad_(requires_grad=False)
    with _quiet():
        import modelopt.torch.quantization as mtq

        stock = mtq.INT8_DEFAULT_CFG if calibrator == "modelopt" else mtq.INT8_SMOOTHQUANT_CFG
        config = stock | {"quant_cfg": [*stock["quant_cfg"], *_switches(plan)]}
        try:
            mtq.quantize(model, config, lambda copied: _show(copied, dataset, progress))
        except AssertionError as error:
            raise S2PError(
                f"nvidia-modelopt found an activation that is not finite ({error}): the pipeline's weights are broken"
            ) from error
    return _read(model, plan)


def _switches(plan: PrecisionPlan) -> Iterator[dict[str, Any]]:
    yield {"quantizer_name": "*", "enable": False}
    for site in plan.sites:
        path = f"network.{_plain(site.site)}"
        if site.weights != "none":
            yield {"quantizer_name": f"{path}.weight_quantizer", "enable": True}
        if site.act_point is not None:
            yield {"quantizer_name": f"{path}.input_quantizer", "enable": True}


@torch.no_grad()
def _show(model: HotDenoiser, dataset: LatentDataset, progress: Progress) -> None:
    stored = points_at(dataset, np.arange(len(dataset.rows)))
    done = 0
    for which in stored.batches():
        model(*(argument.to(model.network.device) for argument in stored.inputs(which)))
        done += len(which)
        progress("modelopt", done, len(stored.row))


def _read(model: HotDenoiser, plan: PrecisionPlan) -> ModeloptStart:
    weight_peaks, act_peaks, smoothing = {}, {}, {}
    for site in plan.sites:
        name = _plain(site.site)
        module: Any = model.network.get_submodule(name)
        if site.weights != "none":
            peaks = module.weight_quantizer.amax.detach().float().cpu()
            weight_peaks[name] = peaks.view(weight_scale_shape(module.weight))
        if site.act_point is not None:
            act_peaks[name] = module.input_quantizer.amax.detach().float().cpu()
            if module.input_quantizer.pre_quant_scale is not None:
                smoothing[name] = 1 / module.input_quantizer.pre_quant_scale.detach().float().cpu()
    return ModeloptStart(weight_peaks, act_peaks, smoothing)


def _scale(peak: Tensor, fmt: IntegerFormat) -> Tensor:
    return peak.clamp_min(_SMALLEST) / fmt.qmax


def _plain(site: str) -> str:
    return site.removesuffix(_SMOOTHED)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without modelopt's prints and its warnings about layers that the plan keeps in floating point."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
