"""Calibration: prompts, a pipeline and a recipe give a CalibratedModel (S2P, arXiv 2412.06661)."""

from s2p_deploy.calib.adapt import adapt
from s2p_deploy.calib.calibrate import calibrate, dataset_name, training_fit
from s2p_deploy.calib.dataset import dataset_request, generate_dataset
from s2p_deploy.calib.hooks import Hooks
from s2p_deploy.calib.plan import plan_from_recipe
from s2p_deploy.calib.quantized_denoiser import (
    FakeQuantDenoiser,
    QuantizedConv2d,
    QuantizedDenoiser,
    QuantizedLinear,
    fake_quant_denoiser,
    fp_denoiser,
)

__all__ = [
    "FakeQuantDenoiser",
    "Hooks",
    "QuantizedConv2d",
    "QuantizedDenoiser",
    "QuantizedLinear",
    "adapt",
    "calibrate",
    "dataset_name",
    "dataset_request",
    "fake_quant_denoiser",
    "fp_denoiser",
    "generate_dataset",
    "plan_from_recipe",
    "training_fit",
]
