"""Calibrates a ControlNet as a denoiser is calibrated: S2P on its residuals, from prompts and control pictures.

The floating-point pipeline walks the prompts under the ControlNet. What the ControlNet reads at some steps of each
walk, and its residuals there, are the dataset; plan, scales and training are those of a denoiser.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.calib.calibrate import starting_state, training_setting, write_model
from s2p_deploy.calib.hooks import Hooks, denoiser_weights
from s2p_deploy.calib.model_files import training_summary
from s2p_deploy.calib.plan import planned_layers
from s2p_deploy.calib.request import KIND, CalibrationRequest, claim_unfinished, open_calibrated
from s2p_deploy.calib.training import train
from s2p_deploy.calib.trajectories import FloatPipeline, encode_prompts
from s2p_deploy.context import Context
from s2p_deploy.errors import InputError
from s2p_deploy.families import (
    EncodedText,
    indexed_denoiser,
    latent_shape_of,
    load_pipeline,
    network_config,
    time_table_of,
)
from s2p_deploy.families.controlnets import load_controlnet, with_controlnets
from s2p_deploy.families.registry import controlnet_kind
from s2p_deploy.families.text import is_sd3
from s2p_deploy.recipe import Rule
from s2p_deploy.records import CalibratedModel, LatentDataset, PromptSet, check_vacant, file_digest, write_artifact
from s2p_deploy.records.exported_graph import CONTROL_FILE
from s2p_deploy.records.files import claimed, write_tensors
from s2p_deploy.timesteps import timestep_indices, timestep_table_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline, ModelMixin
    from PIL.Image import Image
    from torch import Tensor, nn

    from s2p_deploy.calib.training_state import TrainingState
    from s2p_deploy.families import BasePipeline, IndexedDenoiser
    from s2p_deploy.families.controlnet_family import ControlNetKind
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import TimestepTable

_DATASET = "dataset"
_AT_ONCE = 8  # prompts that are walked together


def calibrate_controlnet(  # noqa: PLR0913 - what is calibrated, from what, to where, and options by keyword
    base: BasePipeline,
    folder: Path,
    recipe: Recipe,
    prompts: PromptSet,
    pictures: Sequence[Image],
    out: Path,
    *,
    replace: bool = False,
    context: Context = Context(),
) -> CalibratedModel:
    """Calibrates a ControlNet and writes the CalibratedModel at ``out``, its dataset in ``out/dataset``.

    Unfinished work is in ``<out>.partial``: a second start with the same request continues it, once the walk is done,
    and a finished ``out`` of the same request is returned as it is.

    Args:
        base: the floating-point pipeline that it acts in.
        folder: the ControlNet, in diffusers format.
        recipe: what to do; rules for the first layer, the last and the text are the ControlNet's own, and training
            keeps its last iteration.
        prompts: the first ``dataset.prompts`` are walked.
        pictures: what the ControlNet reads for each prompt, in turn; of the size that the pipeline draws.
        out: folder of the artifact.
        replace: whether an artifact at ``out`` may be replaced.
        context: where it is computed, and whom to report to.

    Raises:
        InputError: the ControlNet does not fit the pipeline; there are no pictures; ``out`` or its partial is of
            another request.
        S2PError: training diverged. IntegrityError: a finished artifact was changed.
    """
    context.set_threads()
    if not pictures:
        raise InputError("a ControlNet is calibrated with pictures that it reads: give some")
    if base.task != "text-to-image":
        raise InputError(f"a ControlNet of a {base.pipeline_class} cannot be calibrated: run it in floating point")
    pipe = load_pipeline(base)
    network = load_controlnet(folder, base.denoiser_config(), pipe.vae_scale_factor)
    kind = controlnet_kind(network_config(network))
    resolved = _resolved(recipe, base, kind)
    height, width = (pipe.vae_scale_factor * side for side in latent_shape_of(base.denoiser_config())[1:])
    other = next((picture for picture in pictures if picture.size != (width, height)), None)
    if other is not None:
        raise InputError(
            f"a control picture has {other.width}x{other.height} pixels: give pictures of {width}x{height}, as the"
            " pipeline draws them"
        )
    walked = prompts.first(resolved.dataset.prompts)
    request = dataclasses.replace(
        _request(base, resolved, walked, kind.embedding_of(network), out, replace=replace, context=context),
        control=_digests(folder, pictures),
    )
    check_vacant(out, KIND, replace=True, inputs={"pipeline": base.folder, "ControlNet": folder})
    with claimed(request.partial), context.arithmetic():
        if out.exists() and not replace:
            return open_calibrated(request)
        claim_unfinished(request.partial, request.conditions(), replace=replace)
        steps, fractional = resolved.sampling.steps, bool(kind.added_width(network_config(network)))
        timesteps = timestep_table_of(pipe.scheduler, steps, fractional=fractional)
        finished = request.partial / _DATASET
        network.to(context.torch_device)
        calls = None if finished.exists() else _walk(pipe, network, request, pictures)
        source = _as_denoiser(pipe, network, timesteps, latent_shape_of(base.denoiser_config())[1:])
        dataset = LatentDataset.open(finished) if calls is None else _dataset(request, source, calls, base)
        transforms, layers, plan = planned_layers(
            resolved,
            request.hooks.transforms(source.denoiser, resolved),
            source.denoiser.config,
            source.time_source,
            None,
        )
        teacher = copy.deepcopy(source.denoiser) if resolved.training.features.targets != "none" else None
        state, transforms = starting_state(request, source, transforms, layers, plan, dataset)
        if teacher is not None:
            transforms.apply(teacher)
        setting = training_setting(request, source, teacher, state, dataset)
        outcome = train(state, dataset, setting, request.partial, context.progress)
        about = {"training": training_summary(request, state.calibrated.tolist(), outcome)}
        write_model(request, source, state, transforms, dataset, about)
        shutil.rmtree(request.partial)
    return CalibratedModel.open(out)


def _digests(folder: Path, pictures: Sequence[Image]) -> dict[str, Any]:
    """Names the ControlNet's files, and what it reads."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in {".json", ".safetensors"}]
    read = hashlib.sha256(b"".join(np.asarray(picture).tobytes() for picture in pictures)).hexdigest()
    return {"ControlNet": {file.name: file_digest(file) for file in files}, "control pictures": read}


def _resolved(recipe: Recipe, base: BasePipeline, kind: ControlNetKind) -> Recipe:
    """Gives a recipe the rules of a ControlNet, and leaves out what only a denoiser's calibration has.

    Its edges are a few percent of the work, and their errors go to the denoiser.
    """
    edges = tuple(Rule(match=match, weights="int8", activations="none") for match in kind.edges)
    own = tuple(rule for rule in recipe.rules if rule.match not in {"input", "output"})
    selection = recipe.training.selection.model_copy(update={"prompts": 0})
    return recipe.with_sampling(base.default_guidance, base.default_strength).model_copy(
        update={
            "rules": own if recipe.is_float else (*own, *edges),
            "training": recipe.training.model_copy(update={"selection": selection}),
        }
    )


def _request(  # noqa: PLR0913 - a calibration's own arguments
    base: BasePipeline,
    recipe: Recipe,
    prompts: PromptSet,
    embedding: nn.Module,
    out: Path,
    *,
    replace: bool,
    context: Context,
) -> CalibrationRequest:
    nothing = PromptSet(())
    hooks = Hooks(stored_weights=partial(_with_embedding, embedding))
    return CalibrationRequest(base, recipe, prompts, nothing, nothing, out, None, None, None, replace, hooks, context)


def _with_embedding(
    embedding: nn.Module, folder: Path, state: TrainingState, timesteps: TimestepTable
) -> dict[str, Tensor]:
    """Writes the weights of what embeds a control picture beside those that are calibrated."""
    write_tensors(folder / CONTROL_FILE, {name: value.float().cpu() for name, value in embedding.state_dict().items()})
    return denoiser_weights(folder, state, timesteps)


@dataclasses.dataclass(frozen=True)
class _Calls:
    """Calls of a ControlNet: latents with the embedding beside them float32 [n, C, H, W], timesteps and prompts [n]."""

    sample: Tensor
    timesteps: Tensor
    prompt: Tensor


@torch.no_grad()
def _walk(
    pipe: DiffusionPipeline, network: ModelMixin, request: CalibrationRequest, pictures: Sequence[Image]
) -> _Calls:
    """Draws the prompts under the ControlNet in floating point, and keeps some of its calls for each."""
    recipe, progress, sampling = request.recipe, request.context.progress, request.recipe.sampling
    prompts, device = request.prompts.prompts, request.context.torch_device
    config, signature = network_config(network), inspect.signature(network.forward)
    kind = controlnet_kind(config)
    longest = {"max_sequence_length": sampling.max_sequence_length} if is_sd3(pipe) else {}
    stock = with_controlnets(pipe, [network]).to(device)
    samples, timesteps, owners = [], [], []
    for first in range(0, len(prompts), _AT_ONCE):
        some = prompts[first : first + _AT_ONCE]
        seen: list[tuple[Tensor, Tensor]] = []
        embedded: list[Tensor] = []

        def keep(
            _module: nn.Module,
            args: tuple[Any, ...],
            named: dict[str, Any],
            seen: list[tuple[Tensor, Tensor]] = seen,
            size: int = len(some),
        ) -> None:
            given = signature.bind(*args, **named).arguments
            latents, timestep = next(iter(given.values())), torch.as_tensor(given["timestep"])
            seen.append((latents[-size:].cpu(), timestep.reshape(-1)[0].float().cpu()))

        def keep_embedding(
            _module: nn.Module, _args: object, output: Tensor, to: list[Tensor] = embedded, size: int = len(some)
        ) -> None:
            to[:] = [kind.spread(output[-size:], config).cpu()]

        hooks = [
            network.register_forward_pre_hook(keep, with_kwargs=True),
            kind.embedding_of(network).register_forward_hook(keep_embedding),
        ]
        try:
            stock(
                prompt=[prompt.text for prompt in some],
                negative_prompt=[prompt.negative for prompt in some] if any(p.negative for p in some) else None,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                generator=[torch.Generator().manual_seed(prompt.noise_seed) for prompt in some],
                output_type="latent",
                **{kind.picture: [pictures[number % len(pictures)] for number in range(first, first + len(some))]},
                **longest,
            )
        finally:
            for hook in hooks:
                hook.remove()
        for place, prompt in enumerate(some):
            for call in request.hooks.stored_calls(recipe, prompt, len(seen)):
                latents, timestep = seen[call]
                samples.append(torch.cat([latents[place], embedded[0][place]]))
                timesteps.append(timestep)
                owners.append(first + place)
        progress("walk", first + len(some), len(prompts))
    return _Calls(torch.stack(samples), torch.stack(timesteps), torch.tensor(owners))


def _as_denoiser(
    pipe: DiffusionPipeline, network: ModelMixin, timesteps: TimestepTable, size: Sequence[int]
) -> FloatPipeline:
    """Takes a ControlNet over as an indexed denoiser, beside its pipeline."""
    kind = controlnet_kind(network_config(network))
    kind.without_embedding(network, size[0] if len(set(size)) == 1 else tuple(size))
    table = time_table_of(network, len(timesteps.angle))
    denoiser = indexed_denoiser(network, table or timesteps).eval()
    return FloatPipeline(pipe, denoiser, timesteps, table, table)


@torch.no_grad()
def _dataset(request: CalibrationRequest, source: FloatPipeline, calls: _Calls, base: BasePipeline) -> LatentDataset:
    """Writes the calls, with the residuals of both branches, as a LatentDataset in the work folder."""
    sampling, progress = request.recipe.sampling, request.context.progress
    texts = encode_prompts(
        source.pipe, request.prompts, sampling.max_sequence_length, guidance_scale=sampling.guidance_scale
    )
    distinct, config = texts.distinct, source.denoiser.config
    if config.get("force_zeros_for_pooled_projection"):  # stock pipelines of SD3 give its ControlNet no pooled text
        distinct = dataclasses.replace(distinct, added_cond=torch.zeros_like(distinct.added_cond))
    guided = not torch.equal(texts.cond, texts.uncond)
    sample = calls.sample.half()
    indices = torch.from_numpy(timestep_indices(calls.timesteps.double().numpy(), source.timesteps))
    branches = {"cond": texts.cond, "uncond": texts.uncond} if guided else {"cond": texts.cond}
    outputs: dict[str, list[Tensor]] = {name: [] for name in branches}
    for number, which in enumerate(torch.arange(len(sample)).split(_AT_ONCE)):
        for name, text in branches.items():
            own = text[calls.prompt[which]]
            outputs[name].append(_residuals(source.denoiser, sample[which], indices[which], distinct, own))
        progress("residuals", min((number + 1) * _AT_ONCE, len(sample)), len(sample))

    def fill(folder: Path) -> dict[str, Any]:
        shard = {"latents": sample, "timestep_indices": indices, "prompt": calls.prompt}
        write_tensors(folder / "shard-00000.safetensors", shard | {n: torch.cat(v) for n, v in outputs.items()})
        text = {"texts": distinct.states.half(), "added_cond": distinct.added_cond}
        write_tensors(folder / "texts.safetensors", text | {"cond_text": texts.cond, "uncond_text": texts.uncond})
        return {"samples": len(sample), "sampling": {"guided": guided}}

    sections = {name: getattr(request.recipe, name).model_dump(mode="json") for name in ("sampling", "dataset")}
    out = request.partial / _DATASET
    write_artifact(out, kind="LatentDataset", base=base.base, recipe=sections, fill=fill)
    return LatentDataset.open(out)


def _residuals(
    denoiser: IndexedDenoiser, sample: Tensor, indices: Tensor, distinct: EncodedText, text: Tensor
) -> Tensor:
    device = denoiser.device
    states, added = distinct.states[text].half().float(), distinct.added_cond[text]
    inputs = (sample.float(), indices, states, added)
    output: Tensor = denoiser(*(each.to(device) for each in inputs))
    return output.half().cpu()
