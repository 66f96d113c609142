"""Names of tensors in Stable Diffusion's original code, for those that diffusers and transformers have."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

Tensors = dict[str, "Tensor"]

DENOISER = "model.diffusion_model."
TEXT_ENCODERS = {
    "StableDiffusionPipeline": {"text_encoder": "cond_stage_model.transformer."},
    "StableDiffusionXLPipeline": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "StableDiffusion3Pipeline": {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": "text_encoders.t5xxl.transformer.",
    },
}
OPEN_CLIP_OF_SD2 = {"text_encoder": "cond_stage_model.model."}


def original_tensors(networks: Mapping[str, tuple[Tensors, Any]], prefixes: Mapping[str, str]) -> Tensors:
    """Names the tensors of networks, given with their configurations; ``prefixes`` are those of the text encoders."""
    tensors: Tensors = {}
    for name, (network, config) in networks.items():
        if name in prefixes:
            named = open_clip(network) if prefixes[name].endswith(".model.") else clip(network)
        else:
            named = {"unet": unet, "transformer": mmdit, "vae": autoencoder}[name](network, config)
        start = prefixes.get(name, "first_stage_model." if name == "vae" else DENOISER)
        tensors |= {start + key: tensor for key, tensor in named.items()}
    return tensors


def unet(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Names a UNet's tensors as CompVis' code does."""
    each = config["layers_per_block"] + 1
    attentive = {name.split(".")[1] for name in tensors if name.startswith("up_blocks") and ".attentions." in name}
    layers = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    inner = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }

    def named(name: str) -> str:
        module, _, kind = name.rpartition(".")
        if module in layers:
            return f"{layers[module]}.{kind}"
        side, *rest = name.split(".")
        if side == "mid_block":
            part, number, *rest = rest
            place = f"middle_block.{2 * int(number) if part == 'resnets' else 1}"
        else:
            block, part, number, *rest = rest
            first = each * int(block) + (side == "down_blocks")
            start = "input_blocks" if side == "down_blocks" else "output_blocks"
            if part == "downsamplers":
                return f"{start}.{first + each - 1}.0.op.{kind}"
            if part == "upsamplers":
                return f"{start}.{first + each - 1}.{1 + (block in attentive)}.conv.{kind}"
            place = f"{start}.{first + int(number)}.{int(part == 'attentions')}"
        if part == "resnets":
            rest[0] = inner[rest[0]]
        return ".".join((place, *rest))

    return {named(name): tensor for name, tensor in tensors.items()}


def autoencoder(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Names an autoencoder's tensors as CompVis' code does, whose attention is made of convolutions."""
    last = len(config["up_block_types"]) - 1
    found = {}
    for name, tensor in tensors.items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
        new = re.sub(r"to_([qkv])\.", r"\1.", new).replace("to_out.0", "proj_out")
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        is_product = "attn_1" in new and tensor.ndim == 2
        found[new] = tensor[:, :, None, None] if is_product else tensor
    return found


def clip(tensors: Tensors) -> Tensors:
    """Names an encoder's tensors as transformers did when the models were published; T5's names are still the same."""
    wrapped = ("embeddings.", "encoder.layers.", "final_layer_norm.")
    return {f"text_model.{name}" if name.startswith(wrapped) else name: tensor for name, tensor in tensors.items()}


def open_clip(tensors: Tensors) -> Tensors:
    """Names an encoder's tensors as open_clip does, which keeps queries, keys and values in one."""
    named = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    }
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    found: Tensors = {}
    for name, tensor in (whole := clip(tensors)).items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif name in named:
            found[named[name]] = tensor
        elif ".final_layer_norm." in name:
            found[name.replace("text_model.final_layer_norm", "ln_final")] = tensor
        elif ".q_proj." in name:
            kind = name.rpartition(".")[2]
            start = re.sub(r"text_model\.encoder\.layers\.(\d+)\.self_attn\..*", r"transformer.resblocks.\1.attn", name)
            parts = [whole[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[f"{start}.in_proj_{kind}"] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            new = name.replace("text_model.encoder.layers", "transformer.resblocks").replace("self_attn", "attn")
            for old, other in inner.items():
                new = new.replace(old, other)
            found[new] = tensor
    return found


def mmdit(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Names a transformer's tensors as SD 3's code does, which keeps queries, keys and values in one."""
    last = config["num_layers"] - 1
    fixed = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
    inner = {
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn2.to_out.0": "x_block.attn2.proj",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    joined = {"attn.to_q": "x_block.attn", "attn2.to_q": "x_block.attn2", "attn.add_q_proj": "context_block.attn"}
    found: Tensors = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        swapped = torch.cat(tensor.chunk(2)[::-1])
        if name in fixed or module in fixed:
            new = fixed[name] if name in fixed else f"{fixed[module]}.{kind}"
            found[new] = swapped if module == "norm_out.linear" else tensor
            continue
        if not name.startswith("transformer_blocks."):
            found[name] = tensor
            continue
        _, number, *rest = module.split(".")
        part, block = ".".join(rest), f"joint_blocks.{number}"
        if part in inner:
            found[f"{block}.{inner[part]}.{kind}"] = (
                swapped if part == "norm1_context.linear" and int(number) == last else tensor
            )
        elif part in joined:
            letters = [re.sub(r"(to_|add_)q", rf"\1{letter}", name) for letter in "qkv"]
            found[f"{block}.{joined[part]}.qkv.{kind}"] = torch.cat([tensors[letter] for letter in letters])
    return found
