"""Stock diffusers pipelines with an engine in them: its component, and pictures from them."""

from s2p_deploy.pipeline.component import (
    EngineComponent,
    EngineDenoiser,
    EngineTransformer,
    denoiser_from_engine,
    engine_denoiser,
)
from s2p_deploy.pipeline.drawing import (
    Schedule,
    call_arguments,
    generate,
    initial_noise,
    latent_size,
    picture_size,
    pipeline_with_engine,
    timesteps_of,
    with_schedule,
)
from s2p_deploy.pipeline.opening import (
    EnginePipeline,
    load_engine_pipeline,
    open_engine_pipeline,
    save_engine_pipeline,
)
from s2p_deploy.pipeline.parts import EngineAutoencoder, EngineTextEncoder, part_components

__all__ = [
    "EngineAutoencoder",
    "EngineComponent",
    "EngineDenoiser",
    "EnginePipeline",
    "EngineTextEncoder",
    "EngineTransformer",
    "Schedule",
    "call_arguments",
    "denoiser_from_engine",
    "engine_denoiser",
    "generate",
    "initial_noise",
    "latent_size",
    "load_engine_pipeline",
    "open_engine_pipeline",
    "part_components",
    "picture_size",
    "pipeline_with_engine",
    "save_engine_pipeline",
    "timesteps_of",
    "with_schedule",
]
