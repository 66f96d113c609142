"""The reference of all numeric comparisons: the latents that it runs on, and the activations inside it.

:func:`reference_calls` watches the fake-quantized denoiser; :func:`forced_outputs` puts the recorded activations into
another one, so that every part of that one is fed the reference's activations and no error piles up.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.calib.trajectories import encode_prompts, sampler_of
from s2p_deploy.families import EncodedText, apply_transforms, denoiser_of, new_indexed_denoiser
from s2p_deploy.families.model_family import has_branches, reads_mask
from s2p_deploy.families.pictures import mask_channels

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.calib.trajectories import Sampler
    from s2p_deploy.families import IndexedDenoiser, Tap
    from s2p_deploy.recipe import Sampling
    from s2p_deploy.records import CalibratedModel, LatentDataset, PromptSet, TimestepTable
    from s2p_deploy.validation.pictures import GeneratedPictures

_MOST_PER_CALL = 16
_ELEMENTS_PER_CALL = 2**15  # of latents: two of 64x64


@dataclass(frozen=True)
class ValidationLatents:
    """Inputs of the denoiser: latents, timestep indices and text.

    ``sample`` float32 [n, C, H, W], ``timestep_indices`` int64 [n], ``text`` float32 [n, tokens, D]. ``added_cond``
    float32 [n, A] is what the time features depend on besides the timestep; A may be 0. The two CFG branches of a
    sample stand side by side: n is even. Where ``guided`` is false, a sample has one branch.
    """

    sample: NDArray[np.float32]
    timestep_indices: NDArray[np.int64]
    text: NDArray[np.float32]
    added_cond: NDArray[np.float32]
    guided: bool = True

    def __len__(self) -> int:
        return len(self.timestep_indices)

    def inputs(self) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
        """Returns them as a runner takes them, in the order of a denoiser's arguments."""
        given: dict[str, NDArray[np.float32] | NDArray[np.int64]] = {
            "sample": self.sample,
            "timestep_index": self.timestep_indices,
            "encoder_hidden_states": self.text,
        }
        if self.added_cond.shape[1]:
            given["added_cond"] = self.added_cond
        return given

    def arguments(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Copies them to a device, as a denoiser's arguments."""
        return tuple(torch.from_numpy(value).to(device, copy=True) for value in self.inputs().values())

    def parts(self) -> Iterator[ValidationLatents]:
        """Yields all of them in order, as many at a time as a full-size model's activations fit into memory."""
        size = max(1, min(_MOST_PER_CALL, _ELEMENTS_PER_CALL // self.sample[0].size))
        for start in range(0, len(self), size):
            yield self._some(slice(start, start + size))

    def first(self, count: int) -> ValidationLatents:
        """Takes the first ``count``."""
        return self._some(slice(count))

    def spread(self, count: int) -> ValidationLatents:
        """Takes at most ``count`` (an even number): pairs, evenly spaced."""
        pairs = np.linspace(0, len(self) // 2 - 1, min(count, len(self)) // 2).round().astype(np.int64)
        return self._some(np.stack([2 * pairs, 2 * pairs + 1], 1).ravel())

    def _some(self, some: slice | NDArray[np.int64]) -> ValidationLatents:
        taken = (self.sample[some], self.timestep_indices[some], self.text[some], self.added_cond[some])
        return ValidationLatents(*taken, guided=self.guided)


def branch_of(latent: int, *, guided: bool = True) -> str:
    """Names the CFG branch that a latent is of: of pairs, or the one where nothing is guided."""
    return "text of the prompt" if latent % 2 or not guided else "text of the empty prompt"


def choose_latents(dataset: LatentDataset, count: int) -> ValidationLatents:
    """Chooses at least ``count`` latents (all, where there are fewer), evenly spaced in order of their timesteps."""
    chosen = _chosen_samples(dataset, count)
    prompt = dataset.prompt[chosen]
    branches = [dataset.uncond_text, dataset.cond_text] if dataset.guided else [dataset.cond_text]
    text = np.stack([branch[prompt] for branch in branches], 1).ravel()
    return ValidationLatents(
        sample=np.repeat(dataset.latents[chosen].astype(np.float32), len(branches), axis=0),
        timestep_indices=np.repeat(dataset.timestep_indices[chosen], len(branches)),
        text=dataset.texts[text].astype(np.float32),
        added_cond=dataset.added_cond[text],
        guided=dataset.guided,
    )


def stored_predictions(dataset: LatentDataset, count: int) -> NDArray[np.float32]:
    """Returns the FP denoiser's predictions for :func:`choose_latents` of as many, float32 [n, C, H, W].

    The dataset keeps them in float16.
    """
    chosen = _chosen_samples(dataset, count)
    branches = [dataset.uncond, dataset.cond] if dataset.guided else [dataset.cond]
    pairs = np.stack([branch[chosen] for branch in branches], 1)
    return pairs.reshape(-1, *pairs.shape[2:]).astype(np.float32)


def _chosen_samples(dataset: LatentDataset, count: int) -> NDArray[np.int64]:
    samples = min((count + 1) // 2 if dataset.guided else count, len(dataset.timestep_indices))
    order = np.lexsort((dataset.prompt, dataset.timestep_indices))
    return order[np.linspace(0, len(order) - 1, samples).round().astype(np.int64)]


def latents_of_pictures(  # noqa: PLR0913 - the pictures, how they were drawn, and which latents
    pipe: DiffusionPipeline,
    prompts: PromptSet,
    walk: GeneratedPictures,
    sampling: Sampling,
    timesteps: TimestepTable,
    count: int,
    *,
    device: torch.device | None = None,
) -> ValidationLatents:
    """Chooses latents as :func:`choose_latents` does, from what ``pipe`` drew of ``prompts`` with its own scheduler.

    ``device`` is where the text encoders encode (None: where they are).
    """
    guidance, config = sampling.guidance_scale, dict(denoiser_of(pipe).config)
    texts = encode_prompts(pipe, prompts, sampling.max_sequence_length, device, guidance)
    sampler = sampler_of(pipe, timesteps, sampling.steps, sampling.strength)
    cond, uncond = texts.distinct[texts.cond], texts.distinct[texts.uncond]
    seen = trajectory_inputs(sampler, walk.trajectory)
    if walk.inputs is not None and reads_mask(config):
        mask = mask_channels(pipe, walk.inputs).numpy()
        seen = np.concatenate([seen, np.broadcast_to(mask, (len(seen), *mask.shape))], 2)
    guided = guidance is None or has_branches(config, guidance)
    return latents_of_trajectory(seen, np.asarray(sampler.indices[1:]), cond, uncond if guided else None, count)


def trajectory_inputs(sampler: Sampler, trajectory: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the denoiser's input in every call but the first, float32 [calls - 1, n, C, H, W].

    ``trajectory`` float32 [calls, n, C, H, W] are the latents after each call. ``sampler`` has not begun.
    """
    after = zip(range(1, len(sampler.indices)), trajectory, strict=False)  # the last latents are not denoised
    # a scheduler that has begun takes the scale of the step that it is at, whatever the timestep
    seen = [sampler.copy().net_input(torch.from_numpy(latents), call) for call, latents in after]
    return torch.stack(seen).numpy()


def latents_of_trajectory(
    trajectory: NDArray[np.float32],
    timestep_indices: NDArray[np.int64],
    cond: EncodedText,
    uncond: EncodedText | None,
    count: int,
) -> ValidationLatents:
    """Chooses latents as :func:`choose_latents` does, from a pipeline's own trajectory.

    For a model that was not calibrated on a dataset.

    Args:
        trajectory: float32 [calls, n, C, H, W], the denoiser's input in each call.
        timestep_indices: int64 [calls] of the scheduler's timesteps.
        cond: the n prompts.
        uncond: the n negative ones; None where nothing is guided.
        count: how many.
    """
    calls, prompts = trajectory.shape[:2]
    total = calls * prompts
    branches = [cond] if uncond is None else [uncond, cond]
    points = np.linspace(0, total - 1, min(-(-count // len(branches)), total)).round().astype(np.int64)
    call, prompt = points // prompts, points % prompts
    each = [branch[int(index)] for index in prompt for branch in branches]
    texts = EncodedText.stack(each)
    return ValidationLatents(
        sample=np.repeat(trajectory[call, prompt], len(branches), axis=0),
        timestep_indices=np.repeat(timestep_indices[call], len(branches)),
        text=texts.states.numpy(),
        added_cond=texts.added_cond.numpy(),
        guided=uncond is not None,
    )


@dataclass(frozen=True)
class ReferenceCall:
    """One call: its ``latents``, their ``time_projections`` float32 [batch, P], and activations by tap.

    ``seen`` activations are float32 [batch, ...].
    """

    latents: ValidationLatents
    time_projections: NDArray[np.float32]
    seen: dict[Tap, NDArray[np.float32]] = field(default_factory=dict)


def reference_calls(
    fake_quant: FakeQuantDenoiser, latents: ValidationLatents, taps: Iterable[Tap]
) -> Iterator[ReferenceCall]:
    """Runs the reference over all latents, few at a time, and yields the activations at every tap."""
    wanted = tuple(dict.fromkeys(taps))
    for part in latents.parts():
        with ExitStack() as hooks, torch.no_grad():
            call = ReferenceCall(part, time_features(fake_quant, part))
            for tap in wanted:
                _watch(fake_quant, tap, call, hooks)
            fake_quant(*part.arguments(fake_quant.device))
        yield call


@torch.no_grad()
def time_features(fake_quant: FakeQuantDenoiser, latents: ValidationLatents) -> NDArray[np.float32]:
    """Computes the reference's projected time features of latents, float32 [n, P]."""
    given = (torch.from_numpy(value).to(fake_quant.device) for value in (latents.timestep_indices, latents.added_cond))
    return to_numpy(fake_quant.denoiser.inner.time(*given))


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """Copies a tensor on any device to an array of its own."""
    return tensor.cpu().numpy().copy()


def unquantized_denoiser(calibrated: CalibratedModel) -> IndexedDenoiser:
    """Loads a calibrated model before anything is quantized: its trained weights, float32, in evaluation mode.

    Weights that are kept as codes are on their grid already.
    """
    config = calibrated.denoiser_config()
    denoiser = new_indexed_denoiser(config, calibrated.time_source())
    apply_transforms(denoiser, calibrated.transforms)
    denoiser.load_state_dict({name: torch.from_numpy(value) for name, value in calibrated.weights().items()})
    return denoiser.eval().requires_grad_(requires_grad=False)


def forced_outputs(
    denoiser: IndexedDenoiser, call: ReferenceCall, entering: Collection[Tap], leaving: Collection[Tap]
) -> dict[Tap, NDArray[np.float32]]:
    """Runs ``denoiser`` with ``call``'s activations at the taps ``entering``; returns those at the taps ``leaving``.

    float32 [batch, ...] each. The activation is overwritten in place: other readers of the same tensor, such as a
    residual sum beside the module, read the reference's from then on too.
    """
    forced = _Forced(call, frozenset(entering))
    outputs: dict[Tap, NDArray[np.float32]] = {}
    with ExitStack() as hooks, torch.no_grad():
        for tap in dict.fromkeys((*entering, *leaving)):
            _hook(denoiser.network.get_submodule(tap.module), tap, forced.into(tap, outputs), hooks)
        denoiser(*call.latents.arguments(denoiser.device))
    return {tap: outputs[tap] for tap in leaving}


class _Forced:
    """Overwrites activations once each, and remembers what they were: two taps may look at one tensor."""

    def __init__(self, call: ReferenceCall, entering: frozenset[Tap]) -> None:
        self._call, self._entering = call, entering
        self._before: list[tuple[torch.Tensor, NDArray[np.float32]]] = []

    def into(self, tap: Tap, outputs: dict[Tap, NDArray[np.float32]]) -> Callable[[torch.Tensor], None]:
        def see(tensor: torch.Tensor) -> None:
            before = next((value for seen, value in self._before if seen is tensor), None)
            outputs[tap] = to_numpy(tensor) if before is None else before
            if tap in self._entering and before is None:
                self._before.append((tensor, outputs[tap]))
                tensor.copy_(torch.from_numpy(self._call.seen[tap]))

        return see


def _watch(fake_quant: FakeQuantDenoiser, tap: Tap, call: ReferenceCall, hooks: ExitStack) -> None:
    def see(tensor: torch.Tensor) -> None:
        call.seen[tap] = to_numpy(tensor)

    _hook(fake_quant.layer(tap.module), tap, see, hooks)


def _hook(module: torch.nn.Module, tap: Tap, see: Callable[[torch.Tensor], None], hooks: ExitStack) -> None:
    def enter(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        see(args[0])

    def leave(_module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401 - a tensor or a tuple
        see(output[0] if isinstance(output, tuple) else output)

    hook = module.register_forward_pre_hook(enter) if tap.side == "input" else module.register_forward_hook(leave)
    hooks.callback(hook.remove)
