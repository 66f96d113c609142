"""Stock diffusers pipelines with an engine in them: opened, saved and loaded, and pictures generated with them."""

from s2p_deploy.pipeline.components import (
    AuxiliaryComponent,
    EngineAutoencoder,
    EngineDenoiser,
    EngineTextEncoder,
    EngineTransformer,
    EngineUNet,
    auxiliary_components,
    denoiser_from_engine,
    engine_denoiser,
)
from s2p_deploy.pipeline.control import Control
from s2p_deploy.pipeline.engine_component import EngineComponent
from s2p_deploy.pipeline.engine_controlnet import (
    EngineControlNet,
    EngineSD3ControlNet,
    EngineUNetControlNet,
    controlnet_memory,
    open_controlnet,
)
from s2p_deploy.pipeline.engine_pipeline import (
    EnginePipeline,
    load_engine_pipeline,
    open_pipeline,
    pipeline_with_engine,
    save_engine_pipeline,
    schedules_to_bind,
)
from s2p_deploy.pipeline.generation import (
    Schedule,
    call_arguments,
    generate,
    initial_noise,
    latent_size,
    noise_arguments,
    picture_size,
    timesteps_from_start,
    timesteps_of,
    trained_size,
    with_schedule,
)
from s2p_deploy.pipeline.ip_adapter import ImagePrompt, IpAdapter
from s2p_deploy.pipeline.start_picture import StartPicture

__all__ = [
    "AuxiliaryComponent",
    "Control",
    "EngineAutoencoder",
    "EngineComponent",
    "EngineControlNet",
    "EngineDenoiser",
    "EnginePipeline",
    "EngineSD3ControlNet",
    "EngineTextEncoder",
    "EngineTransformer",
    "EngineUNet",
    "EngineUNetControlNet",
    "ImagePrompt",
    "IpAdapter",
    "Schedule",
    "StartPicture",
    "auxiliary_components",
    "call_arguments",
    "controlnet_memory",
    "denoiser_from_engine",
    "engine_denoiser",
    "generate",
    "initial_noise",
    "latent_size",
    "load_engine_pipeline",
    "noise_arguments",
    "open_controlnet",
    "open_pipeline",
    "picture_size",
    "pipeline_with_engine",
    "save_engine_pipeline",
    "schedules_to_bind",
    "timesteps_from_start",
    "timesteps_of",
    "trained_size",
    "with_schedule",
]
