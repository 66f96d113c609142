"""Model families: everything specific to Stable Diffusion 1 and 2, XL or 3, and stock pipelines of them.

A family is chosen by the class of the denoiser, never by a model's name (:mod:`~s2p_deploy.families.registry`). Its
denoiser becomes an :class:`IndexedDenoiser`, which calibration, export and validation work on.
"""

from s2p_deploy.families.indexed_denoiser import (
    IndexedDenoiser,
    Skeleton,
    WeightDestination,
    indexed_denoiser,
    indexed_denoiser_of,
    indexed_skeleton,
    new_indexed_denoiser,
    weight_destinations,
)
from s2p_deploy.families.layers import (
    DenoiserInputs,
    QuantizableLayer,
    discover_layers,
    latent_shape,
    latent_shape_of,
    layers_behind_norms,
    readers_by_tensor,
    zero_inputs,
)
from s2p_deploy.families.long_text import divide_text, long_prompt_embeds
from s2p_deploy.families.model_family import Block, Config, ModelFamily, Tap
from s2p_deploy.families.own_scheduler import load_scheduler
from s2p_deploy.families.pipelines import (
    BasePipeline,
    base_of,
    check_base,
    denoiser_of,
    load_pipeline,
    resolve_base,
    with_components,
    with_denoiser,
)
from s2p_deploy.families.registry import family_of, family_of_config, network_config
from s2p_deploy.families.text import EncodedText, encode_texts, text_tokens
from s2p_deploy.families.time_path import TimePath, load_time_path, time_table_of
from s2p_deploy.families.transforms import (
    ShiftedLayer,
    SmoothedLinear,
    SplitConv2d,
    apply_transforms,
    module_of_type,
    product_with_shift,
    put_module,
    set_norm_shift,
    shiftable,
    shifted_layers,
    shifts_by_layer,
    unpadded,
)

__all__ = [
    "BasePipeline",
    "Block",
    "Config",
    "DenoiserInputs",
    "EncodedText",
    "IndexedDenoiser",
    "ModelFamily",
    "QuantizableLayer",
    "ShiftedLayer",
    "Skeleton",
    "SmoothedLinear",
    "SplitConv2d",
    "Tap",
    "TimePath",
    "WeightDestination",
    "apply_transforms",
    "base_of",
    "check_base",
    "denoiser_of",
    "discover_layers",
    "divide_text",
    "encode_texts",
    "family_of",
    "family_of_config",
    "indexed_denoiser",
    "indexed_denoiser_of",
    "indexed_skeleton",
    "latent_shape",
    "latent_shape_of",
    "layers_behind_norms",
    "load_pipeline",
    "load_scheduler",
    "load_time_path",
    "long_prompt_embeds",
    "module_of_type",
    "network_config",
    "new_indexed_denoiser",
    "product_with_shift",
    "put_module",
    "readers_by_tensor",
    "resolve_base",
    "set_norm_shift",
    "shiftable",
    "shifted_layers",
    "shifts_by_layer",
    "text_tokens",
    "time_table_of",
    "unpadded",
    "weight_destinations",
    "with_components",
    "with_denoiser",
    "zero_inputs",
]
