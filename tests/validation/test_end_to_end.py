from __future__ import annotations

import numpy as np
import pytest
import torch

from s2p_deploy.calib import FakeQuantDenoiser
from s2p_deploy.engines import TorchRunner
from s2p_deploy.families import load_pipeline
from s2p_deploy.metrics import cosine
from s2p_deploy.records import Skipped
from s2p_deploy.validation import Chain, end_to_end
from s2p_deploy.validation.end_to_end import (
    WholeDenoiser,
    measure_end_to_end,
    measure_floors,
    outputs_of,
    whole_denoiser,
)
from s2p_deploy.validation.measurements import Agreement, Floor
from s2p_deploy.validation.placement import CPU
from s2p_deploy.validation.reference import ValidationLatents


def test_half_precision_is_close_and_not_equal(chain: Chain, latents: ValidationLatents) -> None:
    pipe = load_pipeline(chain.base)
    half, brain = measure_floors(pipe, chain.calibrated.timesteps, latents, None)
    assert (half.name, brain.name) == ("FP pipeline in float16", "FP pipeline in bfloat16")
    assert isinstance(half.agreement, Agreement)
    assert isinstance(brain.agreement, Agreement)
    assert half.agreement.sqnr.shape == half.agreement.cosine.shape == (len(latents),)
    assert 45 < np.median(half.agreement.sqnr) < 90
    assert np.median(brain.agreement.sqnr) < np.median(half.agreement.sqnr) - 10  # three bits, 18 dB
    assert (brain.agreement.cosine > 0.99).all()
    assert (brain.agreement.cosine < 1).all()
    assert next(pipe.unet.parameters()).dtype == torch.float32, "the pipeline is left as it is"


def test_an_engine_is_a_floor_too(chain: Chain, latents: ValidationLatents) -> None:
    pipe = load_pipeline(chain.base)
    timesteps = chain.calibrated.timesteps
    same = TorchRunner(whole_denoiser(pipe, timesteps))
    *_, engine = measure_floors(pipe, timesteps, latents, same)  # type: ignore[arg-type]  # asked as a bound one is
    expected = outputs_of(same, latents)
    assert isinstance(engine, Floor)
    assert isinstance(engine.agreement, Agreement)
    assert engine.name == "FP engine"
    assert (engine.agreement.sqnr == 150).all()
    np.testing.assert_allclose(engine.agreement.cosine, cosine(expected, expected))


def test_a_type_that_is_only_emulated_is_skipped(
    chain: Chain, latents: ValidationLatents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "_SLOWEST", 0.0)
    found = measure_floors(load_pipeline(chain.base), chain.calibrated.timesteps, latents, None)
    assert all(isinstance(floor.agreement, Skipped) and "as long" in floor.agreement.reason for floor in found)


def test_one_reference_at_a_time_is_on_the_device(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU under another name is another device, which gives the same bits."""
    device, moves = torch.device("cpu", 0), []
    move = torch.nn.Module.to

    def noted(module: torch.nn.Module, *target: torch.device) -> torch.nn.Module:
        moves.append((type(module), *target))
        return move(module, *target)

    whole, few = whole_denoiser(load_pipeline(chain.base), chain.calibrated.timesteps), latents.first(2)
    expected = measure_end_to_end(whole, fake_quant, TorchRunner(fake_quant), few)
    monkeypatch.setattr(torch.nn.Module, "to", noted)
    found = measure_end_to_end(whole, fake_quant, TorchRunner(fake_quant), few, device=device)
    to_and_fro = [(kind, there) for kind in (WholeDenoiser, *[FakeQuantDenoiser] * 2) for there in (device, CPU)]
    assert moves == to_and_fro
    assert (found.floor == expected.floor).all()
    assert (found.engine == expected.engine).all()


def test_the_timesteps_of_a_whole_denoiser_keep_their_type_in_half_precision(chain: Chain) -> None:
    half = whole_denoiser(load_pipeline(chain.base), chain.calibrated.timesteps, torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.timesteps.dtype == torch.float32
    assert half.timesteps[981] == 981


def test_cosine_is_of_each_sample() -> None:
    one = np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.0, 0.0]], np.float32)
    other = np.array([[0.0, 3.0], [5.0, 5.0], [-1.0, 0.0], [1.0, 1.0]], np.float32)
    np.testing.assert_allclose(cosine(one, other), [0, 1, -1, np.nan], atol=1e-12)
