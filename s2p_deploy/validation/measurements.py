"""Measurements of a validation: one record per question, with a value per sample where intervals are wanted.

They are kept as JSON that reads back exactly, so that a finished report can be judged again by other gates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, RootModel, ValidationError
from pydantic_core import core_schema

from s2p_deploy.errors import IntegrityError
from s2p_deploy.pipeline import Schedule
from s2p_deploy.records import Number, Skipped
from s2p_deploy.records.typed_json import first_problem

if TYPE_CHECKING:
    from pathlib import Path

Measured = TypeVar("Measured")

NO_WEIGHTS = Skipped("no local weights given")
NOT_CUT = Skipped("parts cannot be cut out of this engine's files")


@dataclass(frozen=True)
class _AsJson:
    """Tells pydantic how an array of one dtype is written as JSON."""

    dtype: type[np.generic]

    def __get_pydantic_core_schema__(self, _source: object, _handler: object) -> core_schema.CoreSchema:
        real = issubclass(self.dtype, np.floating)
        lists = {
            "shape": core_schema.list_schema(core_schema.int_schema(ge=0)),
            "values": core_schema.list_schema(core_schema.float_schema() if real else core_schema.int_schema()),
        }
        form = core_schema.typed_dict_schema({key: core_schema.typed_dict_field(kind) for key, kind in lists.items()})
        to_form = core_schema.plain_serializer_function_ser_schema(
            lambda array: {"shape": list(array.shape), "values": array.ravel().tolist()}, return_schema=form
        )
        return core_schema.no_info_after_validator_function(self._array, form, serialization=to_form)

    def _array(self, form: dict[str, Any]) -> NDArray[Any]:
        try:
            return np.array(form["values"], self.dtype).reshape(form["shape"])
        except OverflowError as error:
            raise ValueError(f"{self.dtype.__name__} cannot hold a value") from error


Floats = Annotated[NDArray[np.float64], _AsJson(np.float64)]
Integers = Annotated[NDArray[np.int64], _AsJson(np.int64)]


class _Json(RootModel[Measured], Generic[Measured]):
    # JSON has no word for what is not a number; as a string it reads back
    model_config = ConfigDict(ser_json_inf_nan="strings")


def to_json(kind: Any, value: object) -> str:  # noqa: ANN401 - an annotation
    """Writes a value of the annotation ``kind`` (records, arrays, tuples, numbers) as one line of JSON."""
    return _Json[kind].model_construct(root=value).model_dump_json()


def from_json(kind: Any, text: bytes, path: Path) -> Any:  # noqa: ANN401 - a value of the annotation
    """Reads what :func:`to_json` wrote.

    Raises:
        IntegrityError: the text of ``path`` is no such value.
    """
    try:
        return _Json[kind].model_validate_json(text).root
    except ValidationError as error:
        raise IntegrityError(f"{path} is damaged: {first_problem(error)}: make the artifact again") from error


@dataclass(frozen=True)
class QuantizerCodes:
    """A quantizer's codes, graph against fake-quant: the fraction of ``n`` that differs, and by how much at most."""

    quantizer: str
    mismatch: float
    max_lsb: int
    n: int


@dataclass(frozen=True)
class BlockAgreement:
    """A block fed the reference's inputs: SQNR in dB of its output against the reference's, pooled over ``n`` latents.

    Pooled, so that one timestep that went wrong is not averaged away.
    """

    block: str
    sqnr: float
    n: int


@dataclass(frozen=True)
class LayerAgreement:
    """A layer cut out of the engine, as :class:`BlockAgreement`; ``quantization`` as in :class:`BlockError`."""

    name: str
    sqnr: float
    quantization: float | None
    n: int


@dataclass(frozen=True)
class BlockError:
    """The cost of quantizing a block: SQNR in dB of the fake-quant block against the same one that is not quantized.

    Both are fed the reference's inputs. None where nothing in the block is quantized.
    """

    block: str
    quantization: float | None


@dataclass(frozen=True)
class TableGap:
    """A table that an engine or graph carries, against the calibrated model's: the largest relative difference.

    ``where`` names the activation quantizer and timestep index, the index, or the text, at which it is.
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

    sqnr: Floats
    cosine: Floats


@dataclass(frozen=True)
class Floor:
    """A denoiser that is not quantized, against the FP denoiser in FP32."""

    name: str
    agreement: Agreement | Skipped


@dataclass(frozen=True)
class EndToEnd:
    """SQNR in dB of every latent, float64 [n], and their ``timestep_indices`` int64 [n].

    ``fake_quant`` and ``engine`` are against the FP denoiser; ``engine_to_fake_quant`` compares these two;
    ``floor`` is fake-quant in FP32 against itself in FP64: what rounding flips alone do. ``cosines`` float64 [2, n]
    are those of fake-quant and of the engine with the FP denoiser. Latents are pairs, the two CFG branches of a
    sample: first the empty prompt's, then the prompt's; ``guidance`` float64 [n / 2] is the engine's difference of
    the two against fake-quant's. Without guidance it is empty, and latents are no pairs.
    """

    timestep_indices: Integers
    fake_quant: Floats
    engine: Floats
    engine_to_fake_quant: Floats
    floor: Floats
    floor_change: float
    cosines: Floats | None = None
    guidance: Floats | None = None

    @property
    def guided(self) -> bool:
        """Returns whether latents are pairs."""
        return self.guidance is None or len(self.guidance) > 0

    @property
    def change(self) -> Floats:
        """Engine less fake-quant, float64 [n] in dB; below zero where the engine is further from FP."""
        return self.engine - self.fake_quant

    @property
    def room(self) -> Floats:
        """float64 [n] in dB: by how much the engine's own error is below quantization's."""
        return self.engine_to_fake_quant - self.fake_quant


@dataclass(frozen=True)
class Similarity:
    """Metrics of two sets of pictures, float64 [n] each: PSNR in dB, SSIM and HaarPSI."""

    psnr: Floats
    ssim: Floats
    haarpsi: Floats


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
    step_error: Floats
    accuracy: tuple[Number, Number] | Skipped
    feature_distance: Number | Skipped
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Perceptual:
    """Metrics of trained networks whose weights were given: the engine's pictures against the FP pipeline's.

    ``lpips`` float64 [n]; Frechet distances between the two sets of pictures in features of Inception (``fid``), in
    its spatial ones (``sfid``) and in CLIP's (``fid_clip``); ``clip_score`` float64 [2, n] of the FP pipeline's and of
    the engine's pictures with their prompts.
    """

    lpips: Floats | Skipped
    fid: Number | Skipped
    sfid: Number | Skipped
    fid_clip: Number | Skipped
    clip_score: Floats | Skipped


@dataclass(frozen=True)
class Measurements:
    """All measurements. ``quantized`` is False for recipe fp; ``*_half`` says what computes in half precision."""

    quantized: bool
    graph_half: bool
    engine_half: bool
    quantizers: tuple[QuantizerCodes, ...] | Skipped
    graph_blocks: tuple[BlockAgreement, ...] | Skipped
    engine_blocks: tuple[BlockAgreement, ...] | Skipped
    end_to_end: EndToEnd | Skipped
    pictures: PictureComparison | Skipped
    other_schedules: tuple[PictureComparison, ...] = ()
    block_errors: tuple[BlockError, ...] = ()
    engine_layers: tuple[LayerAgreement, ...] | Skipped = NOT_CUT
    tables: tuple[TableGap, ...] = ()
    floors: tuple[Floor, ...] = ()
    perceptual: Perceptual | Skipped = NO_WEIGHTS
