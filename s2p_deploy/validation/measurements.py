"""What a validation measures, as records: one per question, per sample where intervals are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np  # these are read at run time too: exact_json reads records by their annotations
from numpy.typing import NDArray

from s2p_deploy.pipeline import Schedule
from s2p_deploy.validation.numbers import Number, Skipped

NO_WEIGHTS = Skipped("no local weights given")
NOT_CUT = Skipped("parts cannot be cut out of this engine's files")


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
class SiteAgreement:
    """As :class:`BlockAgreement` of a site, cut out of the engine; ``quantization`` as in :class:`BlockError`."""

    site: str
    sqnr: float
    quantization: float | None
    n: int


@dataclass(frozen=True)
class BlockError:
    """What quantizing a block costs: SQNR in dB of the fake-quant block against the same one that is not quantized.

    Both are fed the reference's inputs. None where nothing in the block is quantized.
    """

    block: str
    quantization: float | None


@dataclass(frozen=True)
class TableGap:
    """A table that an engine or graph carries, against the calibrated model's: the largest relative difference.

    ``where`` names the act point and row, the row, or the text, at which it is.
    """

    kind: Literal["scales", "time", "text"]
    table: str
    difference: float
    where: str
    n: int
    half: bool = False


@dataclass(frozen=True)
class Agreement:
    """One call of a denoiser on every latent against another: ``sqnr`` in dB and ``cosine``, float64 [n] each."""

    sqnr: NDArray[np.float64]
    cosine: NDArray[np.float64]


@dataclass(frozen=True)
class Floor:
    """A denoiser that is not quantized, against the FP denoiser in FP32."""

    name: str
    agreement: Agreement | Skipped


@dataclass(frozen=True)
class EndToEnd:
    """SQNR in dB of every latent, float64 [n], and the ``rows`` int64 [n] that they sit on.

    ``fake_quant`` and ``engine`` are against the FP denoiser; ``engine_to_fake_quant`` compares these two;
    ``floor`` is fake-quant in FP32 against itself in FP64: what rounding flips alone do. ``cosines`` float64 [2, n]
    are those of fake-quant and of the engine with the FP denoiser. Latents are pairs, the two CFG branches of a point:
    first the empty prompt's, then the prompt's; ``guidance`` float64 [n / 2] is the engine's difference of the two
    against fake-quant's.
    """

    rows: NDArray[np.int64]
    fake_quant: NDArray[np.float64]
    engine: NDArray[np.float64]
    engine_to_fake_quant: NDArray[np.float64]
    floor: NDArray[np.float64]
    floor_change: float
    cosines: NDArray[np.float64] | None = None
    guidance: NDArray[np.float64] | None = None

    @property
    def change(self) -> NDArray[np.float64]:
        """Engine less fake-quant, float64 [n] in dB; below zero where the engine is further from FP."""
        return self.engine - self.fake_quant

    @property
    def room(self) -> NDArray[np.float64]:
        """float64 [n] in dB: by how much the engine's own error is below quantization's."""
        return self.engine_to_fake_quant - self.fake_quant


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
class Perceptual:
    """What networks see whose weights were given: the engine's pictures against the FP pipeline's.

    ``lpips`` float64 [n]; Frechet distances between the two sets of pictures in features of Inception (``fid``), in
    its spatial ones (``sfid``) and in CLIP's (``fid_clip``); ``clip_score`` float64 [2, n] of the FP pipeline's and of
    the engine's pictures with their prompts.
    """

    lpips: NDArray[np.float64] | Skipped
    fid: Number | Skipped
    sfid: Number | Skipped
    fid_clip: Number | Skipped
    clip_score: NDArray[np.float64] | Skipped


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
    block_errors: tuple[BlockError, ...] = ()
    engine_sites: tuple[SiteAgreement, ...] | Skipped = NOT_CUT
    tables: tuple[TableGap, ...] = ()
    floors: tuple[Floor, ...] = ()
    perceptual: Perceptual | Skipped = NO_WEIGHTS
