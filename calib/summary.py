"""What a calibration says about itself: average bits and what training did to the error of every row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from s2p_deploy.numerics import format_by_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser

FLOAT_BITS = 16  # what stays in floating point is deployed in half precision


def average_bits(denoiser: QuantizedDenoiser) -> dict[str, Any]:
    """Average bits of weights and activations over the sites, each weighted by the number of its weights."""
    plan = denoiser.plan
    sizes = [denoiser.hot.unet.get_submodule(site.site).weight.numel() for site in plan.sites]
    weights = [_bits(site.weights) for site in plan.sites]
    activations = [
        _bits("none" if site.act_point is None else plan.point(site.act_point).activations) for site in plan.sites
    ]
    return {
        "weights": _mean(weights, sizes),
        "activations": _mean(activations, sizes),
        "weighting": f"site weight parameters; floating point counts as {FLOAT_BITS} bits",
    }


def training_summary(
    loss: str, rows: Sequence[int], losses: Sequence[float], starting: Tensor, final: Tensor
) -> dict[str, Any]:
    """Errors are mean squared errors over all stored points and both CFG branches, one per calibrated row.

    ``starting_loss`` and ``final_loss`` are their means over the rows in the unit of the recipe's loss.
    """
    unit = starting if loss == "row_balanced" else starting.new_ones(len(rows))
    return {
        "iterations": len(losses),
        "loss": loss,
        "starting_loss": float((starting / unit).mean()),
        "final_loss": float((final / unit).mean()),
        "rows": list(rows),
        "row_errors_start": [float(error) for error in starting],
        "row_errors_final": [float(error) for error in final],
    }


def _bits(name: str) -> int:
    fmt = format_by_name(name)
    return FLOAT_BITS if fmt is None else fmt.bits


def _mean(bits: Sequence[int], sizes: Sequence[int]) -> float:
    return sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)
