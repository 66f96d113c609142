"""Model families: the only place that knows SD1/2, SDXL and SD3 apart. Chosen from the pipeline's configuration."""

from s2p_deploy.families.base import BasePipeline, load_pipeline, resolve_base
from s2p_deploy.families.hot_denoiser import HotDenoiser, hot_denoiser_from_unet, new_hot_denoiser, set_time_table
from s2p_deploy.families.sites import Site, block_names, discover_sites, readers_by_tensor
from s2p_deploy.families.time_table import TimePath, load_time_path, time_table_from_unet
from s2p_deploy.families.transforms import (
    LowRankLinear,
    SmoothedLinear,
    SplitConv2d,
    apply_transforms,
    module_of_kind,
    split_shortcuts,
)

__all__ = [
    "BasePipeline",
    "HotDenoiser",
    "LowRankLinear",
    "Site",
    "SmoothedLinear",
    "SplitConv2d",
    "TimePath",
    "apply_transforms",
    "block_names",
    "discover_sites",
    "hot_denoiser_from_unet",
    "load_pipeline",
    "load_time_path",
    "module_of_kind",
    "new_hot_denoiser",
    "readers_by_tensor",
    "resolve_base",
    "set_time_table",
    "split_shortcuts",
    "time_table_from_unet",
]
