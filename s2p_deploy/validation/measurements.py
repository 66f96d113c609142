"""What a validation measures, as records: one per question, per sample where intervals are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from s2p_deploy.pipeline import Schedule
    from s2p_deploy.validation.numbers import Number, Skipped


@dataclass(frozen=True)
class PointCodes:
    """An act point's codes, graph against fake-quant: the fraction of ``n`` that differs, and by how much at most."""

    point: str
    mismatch: float
    max_lsb: int
    n: int


@dataclass(frozen=True)
class BlockAgreement:
    """A block fed the reference's inputs: SQNR in dB of its output against the reference's, pooled over ``n`` latents.

    Pooled, so that one row that went wrong is not averaged away.
    """

    block: str
    sqnr: float
    n: int


@dataclass(frozen=True)
class EndToEnd:
    """SQNR in dB of every latent, float64 [n], and the ``rows`` int64 [n] that they sit on.

    ``fake_quant`` and ``engine`` are against the FP denoiser; ``engine_to_fake_quant`` compares these two;
    ``floor`` is fake-quant in FP32 against itself in FP64: what rounding flips alone do.
    """

    rows: NDArray[np.int64]
    fake_quant: NDArray[np.float64]
    engine: NDArray[np.float64]
    engine_to_fake_quant: NDArray[np.float64]
    floor: NDArray[np.float64]
    floor_change: float

    @property
    def change(self) -> NDArray[np.float64]:
        """Engine less fake-quant, float64 [n] in dB; below zero where the engine is further from FP."""
        return self.engine - self.fake_quant


@dataclass(frozen=True)
class Similarity:
    """Picture metrics of two drawings, float64 [n] each: PSNR in dB, SSIM and HaarPSI."""

    psnr: NDArray[np.float64]
    ssim: NDArray[np.float64]
    haarpsi: NDArray[np.float64]


@dataclass(frozen=True)
class PictureComparison:
    """The engine's pictures against the FP pipeline's: same prompts, noise, schedule and guidance.

    ``pixel_shift`` is what the FP pictures score against themselves moved by one pixel (mean of four directions).
    ``step_error`` float64 [calls, n] is the latents' relative error after every call of the free-running trajectories,
    ``timesteps`` the scheduler's. Accuracies and distances are None or skipped where they do not apply.
    ``seconds`` per picture: (FP pipeline, engine pipeline), on the machine of the run.
    """

    schedule: Schedule
    guidance_scale: float
    similarity: Similarity
    pixel_shift: Similarity
    timesteps: tuple[float, ...]
    step_error: NDArray[np.float64]
    accuracy: tuple[Number, Number] | Skipped
    feature_distance: Number | Skipped
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Measurements:
    """All answers. ``quantized`` is False for recipe fp; ``*_half`` says what computes in half precision."""

    quantized: bool
    graph_half: bool
    engine_half: bool
    points: tuple[PointCodes, ...] | Skipped
    graph_blocks: tuple[BlockAgreement, ...] | Skipped
    engine_blocks: tuple[BlockAgreement, ...] | Skipped
    end_to_end: EndToEnd | Skipped
    pictures: PictureComparison | Skipped
    other_schedules: tuple[PictureComparison, ...] = ()
