from __future__ import annotations

from s2p_deploy.calib.dataset import Estimate, sample_bytes, text_bytes
from s2p_deploy.calib.trajectories import seconds_of_call
from s2p_deploy.families import IndexedDenoiser
from s2p_deploy.records import LatentDataset, PromptSet


def test_bytes_are_those_of_a_dataset(
    dataset: LatentDataset, float_denoiser: IndexedDenoiser, prompts: PromptSet
) -> None:
    assert sample_bytes(float_denoiser) == 3 * 2 * 4 * 8 * 8 + 16
    arrays = (dataset.latents, dataset.cond, dataset.uncond, dataset.timestep_indices, dataset.prompt)
    assert 18 * sample_bytes(float_denoiser) == sum(array.nbytes for array in arrays)
    texts = (dataset.texts, dataset.added_cond, dataset.cond_text, dataset.uncond_text)
    assert text_bytes(prompts, float_denoiser, 24) == sum(array.nbytes for array in texts)
    files = sum(path.stat().st_size for path in dataset.folder.glob("*.safetensors"))
    assert (
        0 < files - 18 * sample_bytes(float_denoiser) - text_bytes(prompts, float_denoiser, 24) < 4 * 500
    )  # four files' headers


def test_a_call_takes_some_time(float_denoiser: IndexedDenoiser) -> None:
    assert 0 < seconds_of_call(float_denoiser, 24, 4) < 10


def test_an_estimate_is_one_line() -> None:
    text = "1024 samples, 3.2 MB on disk; 370 denoiser calls at batch 32, about "
    assert str(Estimate(1024, 3_200_000, 370, 32, 29.6)) == text + "30 s"
    assert str(Estimate(1024, 3_200_000, 370, 32, 3000)) == text + "50 min"
    assert str(Estimate(1024, 3_200_000, 370, 32, 9000)) == text + "2.5 h"
