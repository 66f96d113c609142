"""LatentDataset: what the floating-point denoiser saw and answered along its own trajectories (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file

from s2p_deploy.records.manifest import Manifest, open_artifact

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True)
class LatentDataset:
    """Stored points of all prompts, in prompt order.

    ``latents`` float16 [n, C, H, W] denoiser inputs (after ``scale_model_input``); ``rows`` int64 [n]; ``cond`` and
    ``uncond`` float16 [n, C, H, W] the teacher's output of either CFG branch; ``prompt`` int64 [n] index of the prompt;
    ``texts`` float32 [m, tokens, D] distinct text states and ``added_cond`` float32 [m, A], what the time features
    depend on besides the timestep (A may be 0); ``cond_text`` and ``uncond_text`` int64 [prompts] index both.
    """

    folder: Path
    manifest: Manifest
    latents: NDArray[np.float16]
    rows: NDArray[np.int64]
    cond: NDArray[np.float16]
    uncond: NDArray[np.float16]
    prompt: NDArray[np.int64]
    texts: NDArray[np.float32]
    added_cond: NDArray[np.float32]
    cond_text: NDArray[np.int64]
    uncond_text: NDArray[np.int64]

    @staticmethod
    def open(folder: Path) -> LatentDataset:
        """Verifies and reads a dataset.

        Raises:
            InputError: there is none. IntegrityError: it was changed.
        """
        manifest = open_artifact(folder, "LatentDataset")
        names = sorted(name for name in manifest.files if name.startswith("shard-"))
        shards = [load_file(folder / name) for name in names]
        columns = {key: np.concatenate([shard[key] for shard in shards]) for key in shards[0]}
        return LatentDataset(folder, manifest, **columns, **load_file(folder / "texts.safetensors"))
