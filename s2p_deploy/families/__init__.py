"""Model families: the only place that knows SD1/2, SDXL and SD3 apart. Chosen from the pipeline's configuration."""

from s2p_deploy.families.base import BasePipeline, load_pipeline, resolve_base
from s2p_deploy.families.hot_denoiser import HotDenoiser, hot_denoiser_from_unet, new_hot_denoiser
from s2p_deploy.families.sites import Site, block_names, discover_sites
from s2p_deploy.families.time_table import time_table_from_unet

__all__ = [
    "BasePipeline",
    "HotDenoiser",
    "Site",
    "block_names",
    "discover_sites",
    "hot_denoiser_from_unet",
    "load_pipeline",
    "new_hot_denoiser",
    "resolve_base",
    "time_table_from_unet",
]
