"""ValidationReport's content: every number with its n, the gates and the verdict, and how the folder is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, PlainSerializer

from s2p_deploy.engines.machine import distribution_version
from s2p_deploy.engines.model_card import CARD, license_of
from s2p_deploy.metrics import mean_of, median_of
from s2p_deploy.records import Base, GateResult, Number, Prompt, Skipped, ValidationReport, write_artifact
from s2p_deploy.records.engine import LayerPrecision
from s2p_deploy.records.validation_report import MEASUREMENTS, REPORT, Verdict
from s2p_deploy.timesteps import scale_origins
from s2p_deploy.validation.checkpoint import Spent
from s2p_deploy.validation.figures import read_training_log
from s2p_deploy.validation.gates import judge, module_limit, verdict_of
from s2p_deploy.validation.measurements import (
    BlockAgreement,
    BlockError,
    LayerAgreement,
    Measurements,
    Perceptual,
    QuantizerCodes,
    to_json,
)
from s2p_deploy.validation.model_card import report_card
from s2p_deploy.validation.report_page import render_html

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from s2p_deploy.recipe import Gates
    from s2p_deploy.records import PromptSet
    from s2p_deploy.validation.chain import Chain
    from s2p_deploy.validation.measurements import Agreement, EndToEnd, PictureComparison
    from s2p_deploy.validation.pictures import PicturePairs

KIND = "ValidationReport"
PICTURES = "pictures"
_SIMILARITIES = ("psnr", "ssim", "haarpsi")
_LIBRARIES = ("s2p-deploy", "torch", "diffusers", "transformers", "numpy", "onnx", "onnxruntime", "openvino")

NotMeasured = Annotated[
    Skipped, PlainSerializer(lambda skipped: {"skipped": skipped.reason}, return_type=dict[str, str])
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)  # what is not a finite number is null in the JSON


class RecipeSummary(_Part):
    """The recipe, and the SQNR in dB that it asks of float32 blocks."""

    name: str
    digest: str
    block_sqnr: float


class EngineSummary(_Part):
    """The engine, as its record describes it."""

    backend: str
    precision: str
    provider: str | None
    optimization: str | None
    dtype: str
    environment: dict[str, str]
    layers: tuple[LayerPrecision, ...]


class GraphNumbers(_Part):
    """Parity of the exported graph, and what quantization costs its blocks."""

    quantizers: tuple[QuantizerCodes, ...] | NotMeasured
    blocks: tuple[BlockAgreement, ...] | NotMeasured
    block_errors: tuple[BlockError, ...]


class EndToEndNumbers(_Part):
    """One call of the denoiser: means over the latents in dB, and SQNR of every latent (``values``)."""

    fake_quant_to_fp: Number
    engine_to_fp: Number
    change: Number
    engine_to_fake_quant: Number
    floor_fp32_to_fp64: Number
    floor_change: Number
    cosine: dict[str, Number]
    timestep_indices: tuple[int, ...]
    values: dict[str, tuple[float, ...]]


class EngineNumbers(_Part):
    """Parity of the engine: its blocks, its layers, one whole call."""

    blocks: tuple[BlockAgreement, ...] | NotMeasured
    layers: tuple[LayerAgreement, ...] | NotMeasured
    end_to_end: EndToEndNumbers | NotMeasured


class FloorNumbers(_Part):
    """A denoiser in half precision against float32: means over the latents."""

    sqnr: Number
    cosine: Number


class BothPipelines(_Part):
    """A number of the FP pipeline and of the engine's."""

    fp: Number
    engine: Number


class Seconds(_Part):
    """Wall seconds per picture of the FP pipeline and of the engine's."""

    fp: float
    engine: float


class StepErrors(_Part):
    """Relative error of the latents after every call: 10th percentile, median and 90th of the pictures."""

    timestep: tuple[float, ...]
    p10: tuple[float, ...]
    median: tuple[float, ...]
    p90: tuple[float, ...]


class PictureNumbers(_Part):
    """The engine's pictures on one schedule against the FP pipeline's; ``values`` has every single picture's."""

    n: int
    scheduler: str
    steps: int
    guidance_scale: float
    median: dict[str, Number]
    pixel_shift_median: dict[str, Number]
    accuracy: BothPipelines | NotMeasured
    feature_distance: Number | NotMeasured
    step_error: StepErrors
    seconds_per_picture: Seconds
    values: dict[str, tuple[float, ...]]
    perceptual: dict[str, Number | dict[str, Number]] = {}

    @property
    def schedule(self) -> str:
        """Describes the schedule in words."""
        return f"{self.scheduler}, {self.steps} steps"


class ScheduleOrigins(_Part):
    """Numbers of a schedule's timesteps that have calibrated, interpolated and clamped scales."""

    scheduler: str
    steps: int
    calibrated: int
    interpolated: int
    clamped: int


class ReportData(_Part):
    """Everything that ``report.json`` says; the page and the model card show the same data.

    ``sizes`` are in bytes, ``block_limits`` in dB; ``bench`` is the output of ``s2p-deploy bench --json``.
    """

    schema_version: int = 2
    recipe: RecipeSummary
    base: Base
    engine: EngineSummary
    digests: dict[str, str]
    weights: dict[str, str]
    versions: dict[str, str]
    command: str
    sizes: dict[str, int]
    gates: tuple[GateResult, ...]
    verdict: Verdict
    graph_numbers: GraphNumbers
    engine_numbers: EngineNumbers
    floors: dict[str, FloorNumbers | NotMeasured]
    pictures: PictureNumbers | NotMeasured
    other_schedules: tuple[PictureNumbers, ...]
    not_run: dict[str, str]
    prompts: tuple[Prompt, ...]
    scale_origins: tuple[ScheduleOrigins, ...]
    block_limits: dict[str, float]
    spent: Spent
    bench: dict[str, Any] | None = None


@dataclass(frozen=True)
class Validated:
    """A finished validation; ``pairs`` are the pictures, None where the engine could not generate any here.

    ``weights`` are the digests of the files that metrics read, ``command`` and ``spent`` how and how long it ran,
    ``bench`` the benchmark of the engine, ``loras`` the digests of those that act in the pictures, by name and weight.
    """

    prompts: PromptSet
    measurements: Measurements
    pairs: PicturePairs | None
    weights: dict[str, str]
    command: str
    spent: Spent
    bench: Mapping[str, Any] | None = None
    loras: dict[str, str] = field(default_factory=dict)


def write_report(chain: Chain, validated: Validated, gates: Gates, out: Path, *, replace: bool) -> ValidationReport:
    """Judges measurements by gates and writes the report.

    Raises:
        InputError: ``out`` may not be written.
    """
    data = report_data(chain, validated, gates)
    engine, pairs = chain.engine, validated.pairs

    def fill(folder: Path) -> dict[str, Any]:
        (folder / REPORT).write_text(data.model_dump_json(indent=1) + "\n", encoding="utf-8")
        kept = to_json(Measurements, validated.measurements)
        (folder / MEASUREMENTS).write_text(kept + "\n", encoding="utf-8")
        html = render_html(data, chain.graph, pairs, training=read_training_log(chain.calibrated.folder))
        (folder / "report.html").write_text(html, encoding="utf-8")
        (folder / CARD).write_text(report_card(data, license_of(chain.base.folder)), encoding="utf-8")
        if pairs is not None:
            pairs.write(folder / PICTURES)
        return {"verdict": data.verdict, "prompts": validated.prompts.digest}

    write_artifact(
        out,
        kind=KIND,
        base=engine.manifest.base,
        recipe=engine.manifest.recipe,
        parents={"engine": (engine.folder, engine.manifest)},
        fill=fill,
        replace=replace,
    )
    return ValidationReport.open(out)


def report_data(chain: Chain, validated: Validated, gates: Gates) -> ReportData:
    """Gathers the report's content: what was validated, its numbers, and how the gates judge them."""
    engine, graph, found = chain.engine, chain.graph, validated.measurements
    results = judge(found, gates)
    manifests = {"engine": engine.manifest, "graph": graph.manifest, "calib": chain.calibrated.manifest}
    manifests |= {"dataset": chain.dataset.manifest} if chain.dataset else {}
    engines = [engine] if engine.low_noise is None else [engine, engine.low_noise]
    if engine.low_noise is not None:
        manifests[f"engine below timestep {engine.boundary:g}, in pictures alone"] = engine.low_noise.manifest
    engine_files = [one.folder / name for one in engines for name in one.engine_files]
    engine_files += [file for one in engines for file in one.folder.glob("text.onnx*")]
    graph_files = [file for name in ("denoiser", "text") for file in graph.folder.glob(f"{name}.onnx*")]
    return ReportData(
        recipe=RecipeSummary(name=chain.recipe.name, digest=chain.recipe.digest(), block_sqnr=gates.block_sqnr),
        base=engine.manifest.base,
        engine=EngineSummary(
            backend=engine.backend,
            precision=engine.precision,
            provider=engine.provider,
            optimization=engine.optimization,
            dtype=engine.dtype,
            environment=engine.environment,
            layers=engine.layers,
        ),
        digests={name: manifest.digest for name, manifest in manifests.items()}
        | {"base": engine.manifest.base.digest, "prompts": validated.prompts.digest}
        | validated.loras,
        weights=validated.weights,
        versions={name: version for name in _LIBRARIES if (version := distribution_version(name))},
        command=validated.command,
        sizes={
            "engine": _bytes(engine_files),
            "graph": _bytes(graph_files),
            "base_denoiser": _bytes(chain.base.denoiser_folder.glob("*.safetensors")),
        },
        gates=results,
        verdict=verdict_of(results),
        prompts=validated.prompts.prompts,
        scale_origins=_scale_origins(chain, found),
        block_limits={
            error.block: module_limit(error.quantization, gates.block_margin, gates, half=found.engine_half)
            for error in found.block_errors
        },
        spent=validated.spent,
        bench=None if validated.bench is None else dict(validated.bench),
        **numbers_of(found),
    )


def numbers_of(found: Measurements) -> dict[str, Any]:
    """Averages measurements to the numbers of :class:`ReportData`, each with its n."""
    perceptual, not_run = _perceptual(found.perceptual)
    pictures = found.pictures
    return {
        "graph_numbers": GraphNumbers(
            quantizers=found.quantizers, blocks=found.graph_blocks, block_errors=found.block_errors
        ),
        "engine_numbers": EngineNumbers(
            blocks=found.engine_blocks,
            layers=found.engine_layers,
            end_to_end=found.end_to_end if isinstance(found.end_to_end, Skipped) else _end_to_end(found.end_to_end),
        ),
        "floors": {floor.name: _floor(floor.agreement) for floor in found.floors},
        "pictures": pictures if isinstance(pictures, Skipped) else _pictures(pictures, perceptual),
        "other_schedules": tuple(_pictures(one) for one in found.other_schedules),
        "not_run": not_run,
    }


def _end_to_end(found: EndToEnd) -> EndToEndNumbers:
    cosines = () if found.cosines is None else zip(("fake_quant_to_fp", "engine_to_fp"), found.cosines, strict=True)
    return EndToEndNumbers(
        fake_quant_to_fp=mean_of(found.fake_quant),
        engine_to_fp=mean_of(found.engine),
        change=mean_of(found.change),
        engine_to_fake_quant=mean_of(found.engine_to_fake_quant),
        floor_fp32_to_fp64=mean_of(found.floor),
        floor_change=Number(found.floor_change, len(found.floor)),
        cosine={name: mean_of(values) for name, values in cosines},
        timestep_indices=tuple(found.timestep_indices.tolist()),
        values={"fake_quant_to_fp": tuple(found.fake_quant.tolist()), "engine_to_fp": tuple(found.engine.tolist())},
    )


def _floor(found: Agreement | Skipped) -> FloorNumbers | Skipped:
    if isinstance(found, Skipped):
        return found
    return FloorNumbers(sqnr=mean_of(found.sqnr), cosine=mean_of(found.cosine))


def _perceptual(found: Perceptual | Skipped) -> tuple[dict[str, Any], dict[str, str]]:
    """Numbers by metric, and the reason of every metric that has none."""
    names = [field.name for field in fields(Perceptual)]
    if isinstance(found, Skipped):
        return {}, dict.fromkeys(names, found.reason)
    values: dict[str, Any] = {name: getattr(found, name) for name in names}
    not_run = {name: value.reason for name, value in values.items() if isinstance(value, Skipped)}
    if isinstance(found.lpips, np.ndarray):
        values["lpips"] = {"median": median_of(found.lpips), "mean": mean_of(found.lpips)}
    if isinstance(found.clip_score, np.ndarray):
        reference, candidate = found.clip_score
        means = {"fp": mean_of(reference), "engine": mean_of(candidate)}
        values["clip_score"] = means | {"change": mean_of(candidate - reference)}
    return {name: value for name, value in values.items() if name not in not_run}, not_run


def _pictures(found: PictureComparison, perceptual: Mapping[str, Any] = {}) -> PictureNumbers:
    low, median, high = (tuple(line.tolist()) for line in np.quantile(found.step_error, (0.1, 0.5, 0.9), axis=1))
    accuracy = found.accuracy
    return PictureNumbers(
        n=len(found.similarity.psnr),
        scheduler=found.schedule.scheduler or "pipeline's own",
        steps=found.schedule.steps,
        guidance_scale=found.guidance_scale,
        median={name: median_of(getattr(found.similarity, name)) for name in _SIMILARITIES},
        pixel_shift_median={name: median_of(getattr(found.pixel_shift, name)) for name in _SIMILARITIES},
        accuracy=accuracy if isinstance(accuracy, Skipped) else BothPipelines(fp=accuracy[0], engine=accuracy[1]),
        feature_distance=found.feature_distance,
        step_error=StepErrors(timestep=found.timesteps, p10=low, median=median, p90=high),
        seconds_per_picture=Seconds(fp=found.seconds[0], engine=found.seconds[1]),
        values={name: tuple(getattr(found.similarity, name).tolist()) for name in _SIMILARITIES},
        perceptual=dict(perceptual),
    )


def _scale_origins(chain: Chain, found: Measurements) -> tuple[ScheduleOrigins, ...]:
    """Counts, for every schedule that was drawn, where the scales of its timesteps come from."""
    drawn = () if isinstance(found.pictures, Skipped) else (found.pictures, *found.other_schedules)
    origins = [(one.schedule, asdict(scale_origins(one.timesteps, chain.engine.timesteps))) for one in drawn]
    return tuple(
        ScheduleOrigins(
            scheduler=schedule.scheduler or "pipeline's own",
            steps=schedule.steps,
            **{origin: len(timesteps) for origin, timesteps in of_schedule.items()},
        )
        for schedule, of_schedule in origins
    )


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
