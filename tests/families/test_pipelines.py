from __future__ import annotations

import pytest
from sibling_pipelines import sibling

from s2p_deploy.families import denoiser_of, load_pipeline, with_denoiser


@pytest.mark.parametrize(("name", "component"), [("sd2", "unet"), ("sdxl", "unet"), ("sd3", "transformer")])
def test_another_denoiser_stands_in_a_pipeline_of_the_same_class(name: str, component: str) -> None:
    pipe = load_pipeline(sibling(name))
    own = denoiser_of(pipe)
    assert own is getattr(pipe, component)
    other = type(own).from_config(own.config)
    made = with_denoiser(pipe, other)
    assert type(made) is type(pipe)
    assert denoiser_of(made) is other
    assert denoiser_of(pipe) is own
    assert made.vae is pipe.vae
    assert made.text_encoder is pipe.text_encoder
    assert made.scheduler is not pipe.scheduler
    assert made.scheduler.config == pipe.scheduler.config
    for key in ("force_zeros_for_empty_prompt", "requires_safety_checker"):
        assert made.config.get(key) == pipe.config.get(key)
