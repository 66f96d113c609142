"""Model families: the only place that knows SD1/2, SDXL and SD3 apart. Chosen from the pipeline's configuration."""

from s2p_deploy.families.accounting import Place, weight_places
from s2p_deploy.families.base import BasePipeline, load_pipeline, resolve_base
from s2p_deploy.families.blocks import Block, Tap
from s2p_deploy.families.hot_denoiser import (
    HotDenoiser,
    Skeleton,
    given_features,
    hot_denoiser,
    hot_denoiser_of,
    hot_skeleton,
    new_hot_denoiser,
    set_time_table,
)
from s2p_deploy.families.kinds import kind_of, kind_of_config, network_config
from s2p_deploy.families.network_kind import NetworkKind
from s2p_deploy.families.pipelines import denoiser_of, with_components, with_denoiser
from s2p_deploy.families.sites import (
    DenoiserInputs,
    Site,
    discover_sites,
    latent_shape,
    latent_shape_of,
    readers_by_tensor,
    zero_inputs,
)
from s2p_deploy.families.text import EncodedText, encode_texts, text_tokens
from s2p_deploy.families.time_features import time_slices
from s2p_deploy.families.time_path import TimePath, load_time_path, time_table_of
from s2p_deploy.families.transforms import (
    LowRankLinear,
    SmoothedLinear,
    SplitConv2d,
    apply_transforms,
    module_of_kind,
)

__all__ = [
    "BasePipeline",
    "Block",
    "DenoiserInputs",
    "EncodedText",
    "HotDenoiser",
    "LowRankLinear",
    "NetworkKind",
    "Place",
    "Site",
    "Skeleton",
    "SmoothedLinear",
    "SplitConv2d",
    "Tap",
    "TimePath",
    "apply_transforms",
    "denoiser_of",
    "discover_sites",
    "encode_texts",
    "given_features",
    "hot_denoiser",
    "hot_denoiser_of",
    "hot_skeleton",
    "kind_of",
    "kind_of_config",
    "latent_shape",
    "latent_shape_of",
    "load_pipeline",
    "load_time_path",
    "module_of_kind",
    "network_config",
    "new_hot_denoiser",
    "readers_by_tensor",
    "resolve_base",
    "set_time_table",
    "text_tokens",
    "time_slices",
    "time_table_of",
    "weight_places",
    "with_components",
    "with_denoiser",
    "zero_inputs",
]
