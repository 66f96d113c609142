"""Question 2, end to end: is the engine as far from floating point as the fake-quant model that it was made from?"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.engines import TorchRunner
from s2p_deploy.validation.floors import outputs_of
from s2p_deploy.validation.measurements import EndToEnd
from s2p_deploy.validation.metrics import cosine, sqnr_db

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.engines import Runner
    from s2p_deploy.validation.latents import ValidationLatents


def measure_end_to_end(
    floating: Callable[..., torch.Tensor], fake_quant: FakeQuantDenoiser, engine: Runner, latents: ValidationLatents
) -> EndToEnd:
    """One call of each denoiser on every latent; ``floating`` is called as a hot denoiser."""
    reference = outputs_of(TorchRunner(floating), latents)
    quantized = outputs_of(TorchRunner(fake_quant), latents)
    double = outputs_of(TorchRunner(copy.deepcopy(fake_quant).double(), torch.float64), latents)
    found = outputs_of(engine, latents)
    to_fp = sqnr_db(reference, quantized)
    return EndToEnd(
        rows=latents.rows,
        fake_quant=to_fp,
        engine=sqnr_db(reference, found),
        engine_to_fake_quant=sqnr_db(quantized, found),
        floor=sqnr_db(double, quantized),
        floor_change=float(np.mean(to_fp - sqnr_db(reference, double))),
        cosines=np.stack([cosine(reference, quantized), cosine(reference, found)]),
        guidance=sqnr_db(_guidance(quantized), _guidance(found)),
    )


def _guidance(outputs: NDArray[Any]) -> NDArray[np.float64]:
    """What the prompt adds to the empty prompt's prediction, [n / 2, ...]."""
    direction: NDArray[np.float64] = outputs[1::2].astype(np.float64) - outputs[::2]
    return direction
