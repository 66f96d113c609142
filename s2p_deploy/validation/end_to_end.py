"""Question 2, end to end: is the engine as far from floating point as the fake-quant model that it was made from?"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.engines import TorchRunner
from s2p_deploy.engines.runner import OUTPUT
from s2p_deploy.validation.measurements import EndToEnd
from s2p_deploy.validation.metrics import sqnr_db

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from numpy.typing import NDArray

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.engines import Runner
    from s2p_deploy.validation.latents import ValidationLatents


def measure_end_to_end(
    floating: Callable[..., torch.Tensor], fake_quant: FakeQuantDenoiser, engine: Runner, latents: ValidationLatents
) -> EndToEnd:
    """One call of each denoiser on every latent; ``floating`` is called as a hot denoiser."""
    reference = _outputs(TorchRunner(floating), latents)
    quantized = _outputs(TorchRunner(fake_quant), latents)
    double = _outputs(TorchRunner(copy.deepcopy(fake_quant).double(), torch.float64), latents)
    found = _outputs(engine, latents)
    to_fp = sqnr_db(reference, quantized)
    return EndToEnd(
        rows=latents.rows,
        fake_quant=to_fp,
        engine=sqnr_db(reference, found),
        engine_to_fake_quant=sqnr_db(quantized, found),
        floor=sqnr_db(double, quantized),
        floor_change=float(np.mean(to_fp - sqnr_db(reference, double))),
    )


def _outputs(runner: Runner, latents: ValidationLatents) -> NDArray[Any]:
    return np.concatenate([runner.infer(part.inputs())[OUTPUT] for part in latents.parts()])
