"""Samples of a LatentDataset as tensors: those to calibrate with, and the batches to train with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.recipe import Training
    from s2p_deploy.records import LatentDataset

_ELEMENTS = 8192  # of latents in one batch: 32 of the bundled pipeline's, one of SD1's


@dataclass(frozen=True)
class SamplePairs:
    """Samples under both of their texts: the first half of all tensors is unconditional, the second conditional.

    Of a dataset without guidance there are conditional ones alone. ``sample`` float32 [n, C, H, W] network inputs;
    ``timestep_index`` int64 [n]; ``text`` int64 [n] indexes ``texts``
    float16 [m, tokens, D] and ``added_cond`` float32 [m, A]; ``output`` float32 [n, C, H, W] the teacher's outputs.
    """

    sample: Tensor
    timestep_index: Tensor
    text: Tensor
    texts: Tensor
    added_cond: Tensor
    output: Tensor

    def batches(self, samples: int | None = None) -> Iterator[Tensor]:
        """Yields indices int64 that together are all samples, so many at a time; None: as fit into a small memory."""
        return iter(torch.arange(len(self.sample)).split(samples or max(1, _ELEMENTS // self.sample[0].numel())))

    def inputs(self, which: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the denoiser's arguments for some samples."""
        text = self.text[which]
        return self.sample[which], self.timestep_index[which], self.texts[text].float(), self.added_cond[text]


def draw_samples(dataset: LatentDataset, count: int, seed: int) -> SamplePairs:
    """Draws ``count`` samples without replacement (all, where there are fewer), in the dataset's order."""
    total = len(dataset.timestep_indices)
    return samples_at(dataset, np.sort(np.random.default_rng(seed).permutation(total)[:count]))


def samples_at(dataset: LatentDataset, which: NDArray[np.int64]) -> SamplePairs:
    """Takes the samples of some indices."""
    prompt = dataset.prompt[which]
    both = ((dataset.uncond_text, dataset.uncond), (dataset.cond_text, dataset.cond))
    branches = both if dataset.guided else both[1:]
    return SamplePairs(
        torch.from_numpy(dataset.latents[which]).float().repeat(len(branches), 1, 1, 1),
        torch.from_numpy(dataset.timestep_indices[which]).repeat(len(branches)),
        torch.from_numpy(np.concatenate([text[prompt] for text, _ in branches])),
        torch.from_numpy(dataset.texts),
        torch.from_numpy(dataset.added_cond),
        torch.from_numpy(np.concatenate([output[which] for _, output in branches])).float(),
    )


def least_noisy(dataset: LatentDataset) -> NDArray[np.int64]:
    """Finds the sample with the smallest timestep index of every prompt; returns its index, by prompt."""
    order = np.lexsort((dataset.timestep_indices, dataset.prompt))
    _, starts = np.unique(dataset.prompt[order], return_index=True)
    least: NDArray[np.int64] = order[starts]
    return least


def calibrated_indices(dataset: LatentDataset) -> tuple[int, ...]:
    """Returns the timestep indices of which the dataset has samples, ascending."""
    return tuple(int(index) for index in np.unique(dataset.timestep_indices))


@dataclass(frozen=True)
class Batch:
    """Samples float32 [b, C, H, W] with their texts and the teacher's outputs ``target``.

    ``timestep_index`` int64 [b]; ``position`` int64 [b], its position among the calibrated indices. A paired batch
    holds the conditional branches of some samples and then the unconditional branches of the same samples.
    """

    sample: Tensor
    timestep_index: Tensor
    position: Tensor
    texts: Tensor
    added_cond: Tensor
    target: Tensor

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the denoiser's arguments."""
        return self.sample, self.timestep_index, self.texts, self.added_cond

    def to(self, device: torch.device) -> Batch:
        """Moves the batch to a device, without a wait."""
        return Batch(*(on_device(getattr(self, name), device) for name in self.__dataclass_fields__))


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a device; the host waits for no GPU, which copies from page-locked memory by itself."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def take_batch(
    dataset: LatentDataset, calibrated: Tensor, which: NDArray[np.int64], uncond: NDArray[np.bool_]
) -> Batch:
    """Takes samples int64 [b], each as the branch that ``uncond`` bool [b] names.

    ``calibrated`` int64: the calibrated timestep indices, ascending.
    """
    prompt = dataset.prompt[which]
    text = np.where(uncond, dataset.uncond_text[prompt], dataset.cond_text[prompt])
    target = np.where(uncond[:, None, None, None], dataset.uncond[which], dataset.cond[which])
    index = torch.from_numpy(dataset.timestep_indices[which])
    return Batch(
        sample=torch.from_numpy(dataset.latents[which]).float(),
        timestep_index=index,
        position=torch.searchsorted(calibrated, index),
        texts=torch.from_numpy(dataset.texts[text]).float(),
        added_cond=torch.from_numpy(dataset.added_cond[text]),
        target=torch.from_numpy(target).float(),
    )


def take_paired_batch(dataset: LatentDataset, calibrated: Tensor, which: NDArray[np.int64]) -> Batch:
    """Takes both branches of samples int64 [n] as a paired batch [2 n, ...]."""
    return take_batch(dataset, calibrated, np.tile(which, 2), np.repeat([False, True], len(which)))


class BatchOrder:
    """The order in which training sees the dataset: every batch is drawn over all prompts and timesteps."""

    def __init__(self, dataset: LatentDataset, calibrated: Tensor, training: Training) -> None:
        self.dataset, self.calibrated, self.training = dataset, calibrated, training

    def draw(self, iteration: int, microbatch: int = 0) -> Batch:
        """Draws one of the ``training.accumulate`` batches of an iteration.

        Its seed is the iteration's number, so a resumed training sees the same batches.
        """
        training = self.training
        generator = np.random.default_rng((training.seed, iteration * training.accumulate + microbatch))
        which = generator.integers(len(self.dataset.timestep_indices), size=training.batch)
        return take_batch(
            self.dataset, self.calibrated, which, generator.random(training.batch) < training.empty_prompt_share
        )

    def shares(self) -> Tensor:
        """Returns how often each calibrated timestep is drawn, float64 [calibrated]; they sum to 1."""
        counts = sample_counts(self.dataset, self.calibrated).double()
        return counts / counts.sum()


def sample_counts(dataset: LatentDataset, calibrated: Tensor) -> Tensor:
    """Counts the samples of each calibrated timestep index, int64 [calibrated]."""
    return torch.bincount(
        torch.searchsorted(calibrated, torch.from_numpy(dataset.timestep_indices)), minlength=len(calibrated)
    )
