"""What a calibration says about itself: average bits and what training did to the error of every row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.calib.quantized_denoiser import SampleGrids
from s2p_deploy.families import zero_inputs
from s2p_deploy.numerics import format_by_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser
    from s2p_deploy.calib.training.losses import RowErrors

FLOAT_BITS = 16  # what stays in floating point is deployed in half precision


def average_bits(denoiser: QuantizedDenoiser, tokens: int = 77) -> dict[str, Any]:
    """Average bits of ``weights`` and ``activations`` over the sites, by three weightings, which differ widely.

    ``parameters`` weighs a site by the number of its weights, ``layers`` not at all, ``input_elements`` by the elements
    that it reads for one sample, with a text of ``tokens`` tokens. Codes count log2(levels) bits, ``floating_point``
    what all else counts.
    """
    plan = denoiser.plan
    weights = [_bits(site.weights) for site in plan.sites]
    activations = [
        _bits("none" if site.act_point is None else plan.point(site.act_point).activations) for site in plan.sites
    ]
    weightings = {
        "parameters": [denoiser.site(site.site).get_parameter("weight").numel() for site in plan.sites],
        "layers": [1] * len(plan.sites),
        "input_elements": _input_elements(denoiser, tokens),
    }
    averages = {
        name: {"weights": _mean(weights, sizes), "activations": _mean(activations, sizes)}
        for name, sizes in weightings.items()
    }
    return averages | {"floating_point": FLOAT_BITS}


@torch.no_grad()
def _input_elements(denoiser: QuantizedDenoiser, tokens: int) -> list[int]:
    """Elements of every site's input for one sample, seen in one forward pass."""
    hot = denoiser.hot
    found: dict[str, int] = {}
    hooks = [
        denoiser.site(site.site).register_forward_pre_hook(
            lambda _, args, name=site.site: found.update({name: args[0].numel()})
        )
        for site in denoiser.plan.sites
    ]
    inputs = zero_inputs(hot, tokens=tokens)
    try:
        denoiser(*inputs.arguments(), SampleGrids(inputs.sample.new_ones(1, len(denoiser.plan.act_points))))
    finally:
        for hook in hooks:
            hook.remove()
    return [found[site.site] for site in denoiser.plan.sites]


def training_summary(rows: Sequence[int], starting: RowErrors, final: RowErrors) -> dict[str, Any]:
    """Mean squared errors and SQNR in dB before and after, one per calibrated row, over all stored points.

    ``starting_loss`` and ``final_loss`` are the means over the rows of the error in units of the row's starting error.
    """
    return {
        "starting_loss": 1.0,
        "final_loss": float((final.error / starting.error).mean()),
        "rows": list(rows),
        "row_errors_start": starting.error.tolist(),
        "row_errors_final": final.error.tolist(),
        "row_sqnr_start": starting.sqnr(),
        "row_sqnr_final": final.sqnr(),
    }


def _bits(name: str) -> float:
    fmt = format_by_name(name)
    return FLOAT_BITS if fmt is None else fmt.bits


def _mean(bits: Sequence[float], sizes: Sequence[int]) -> float:
    return sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)
