"""The report's page: one self-contained HTML file. Everything that came from outside is shown as text."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.errors import InputError
from s2p_deploy.records import Skipped
from s2p_deploy.validation import figures
from s2p_deploy.validation.figures import CHARACTERISTIC, quantizer_scales

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    from s2p_deploy.records import ExportedGraph, Number, PrecisionPlan, ScaleTable
    from s2p_deploy.validation.figures import Log, QuantizerScales
    from s2p_deploy.validation.pictures import PicturePairs
    from s2p_deploy.validation.report import EndToEndNumbers, PictureNumbers, ReportData

AMPLIFICATION = 16  # of the difference of two pictures
MOST_PAIRS = 64
_SHOWN_SIDE = 256  # larger pictures are shown smaller; in full they lie in the folder
_PNG_SIDE = 96  # larger ones are shown as JPEG, which photographs need to stay small
_JPEG_SIDE, _JPEG_QUALITY = 192, 88
_FLOATING = "none"  # what a plan calls a format that is not quantized
_LEAST_BAR = 0.04  # of the strip's height: a layer that hardly matters still shows
_END_TO_END = {
    "fake_quant_to_fp": "fake-quant to FP",
    "engine_to_fp": "engine to FP",
    "change": "change: engine less fake-quant",
    "engine_to_fake_quant": "engine to fake-quant",
    "floor_fp32_to_fp64": "floor: fake-quant in FP32 to itself in FP64",
    "floor_change": "floor: the change that FP64 alone makes",
}
# keys of the report that its tables of numbers leave out: they are drawn, or describe
_NO_NUMBERS = frozenset(
    {"values", "timestep_indices", "step_error", "seconds_per_picture", "blocks", "layers", "quantizers"}
) | {"n", "scheduler", "steps", "guidance_scale", "perceptual"}
_SHOWN_ELSEWHERE = ("accuracy", "feature_distance", "median", "pixel_shift_median")
_VERDICTS = {
    "passed": "The engine draws the same pictures",
    "failed": "The engine failed a gate",
    "not verified": "Not everything could be verified here",
}


def render_html(
    data: ReportData, graph: ExportedGraph, pairs: PicturePairs | None, *, training: Log | None = None
) -> str:
    """Renders the page of a report.

    Args:
        data: the report's content.
        graph: the exported graph, for its plan and its scales.
        pairs: the pictures, or None where none were drawn.
        training: lines of the calibrated model's ``training.jsonl``.

    Raises:
        InputError: the benchmark in ``data`` knows nothing of this engine.
    """
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    pictures = None if isinstance(data.pictures, Skipped) else data.pictures
    numbers = data.engine_numbers.end_to_end
    end_to_end = None if isinstance(numbers, Skipped) else numbers
    drawn = _figures(data, pictures, end_to_end, graph.scales) | figures.training_figures(training or [])
    scales = quantizer_scales(graph.scales)
    layers = layers_of(data, graph.plan, scales)
    environment = Environment(
        loader=PackageLoader("s2p_deploy.validation"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"number": _number, "interval": _interval, "plain": _plain}
    return environment.get_template("report.html.j2").render(
        data=data,
        headline=_headline(data, pictures),
        pictures=pictures,
        pairs=shown_pairs(pairs, pictures.values["psnr"]) if pairs and pictures else [],
        amplification=AMPLIFICATION,
        figures={name: Markup(svg) for name, svg in drawn.items()},  # our own
        script=Markup(script()),  # our own, and the policy names its hash
        script_hash=script_hash(),
        scales=scales,
        characteristic=[quantizer for color in CHARACTERISTIC for quantizer in scales if quantizer.color == color],
        layers=layers,
        groups=groups_of(layers),
        computes=Counter(layer.compute for layer in layers if layer.compute).most_common(),
        metrics=_metric_rows(data),
        end_to_end=[(label, getattr(end_to_end, key)) for key, label in _END_TO_END.items()] if end_to_end else [],
        bench=data.bench,
        bench_rows=bench_rows(data.bench, data.digests["engine"]) if data.bench else [],
    )


@cache
def script() -> str:
    """Reads the page's script, which holds nothing from outside."""
    return resources.files("s2p_deploy.validation").joinpath("templates/report.js").read_text(encoding="utf-8")


def script_hash() -> str:
    """Computes what the content security policy allows to run: ``sha256-...``."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script().encode("utf-8")).digest()).decode("ascii")


def _headline(data: ReportData, pictures: PictureNumbers | None) -> str:
    verdict = _VERDICTS[data.verdict]
    if pictures is None or not math.isfinite(pictures.median["psnr"].value):
        return verdict
    psnr = pictures.median["psnr"].value
    return f"{verdict}: {pictures.n} prompts, {pictures.steps} steps, median {psnr:.1f} dB PSNR"


def _figures(
    data: ReportData, pictures: PictureNumbers | None, end_to_end: EndToEndNumbers | None, scales: ScaleTable
) -> dict[str, str]:
    drawn: dict[str, str] = {}
    # all figures over timesteps share one axis, from noise to picture
    shown: list[float] = [*scales.calibrated, *(end_to_end.timestep_indices if end_to_end else ())]
    shown += pictures.step_error.timestep if pictures else ()
    margin = 0.02 * max(max(shown, default=1) - min(shown, default=0), 1)
    span = max(shown, default=1) + margin, min(shown, default=0) - margin
    if pictures is not None:
        errors = {one.schedule: one.step_error for one in (pictures, *data.other_schedules)}
        drawn["psnr"] = figures.psnr_figure(pictures.values["psnr"], pictures.pixel_shift_median["psnr"].value)
        drawn["trajectory"] = figures.trajectory_figure(errors, span)
    if end_to_end is not None:
        labels = {"fake-quant": "fake_quant_to_fp", "engine": "engine_to_fp"}
        lines = {label: end_to_end.values[key] for label, key in labels.items()}
        drawn["timestep"] = figures.timestep_figure(end_to_end.timestep_indices, lines, span)
    blocks = data.graph_numbers.blocks, data.engine_numbers.blocks
    graph, engine = (() if isinstance(found, Skipped) else found for found in blocks)
    if graph:
        limits = data.block_limits or {block.block: data.recipe.block_sqnr for block in graph}
        drawn["blocks"] = figures.block_figure(graph, engine, limits)
    return drawn | (figures.scales_figures(scales, span) if figures.drawable(scales) else {})


# Numbers


@dataclass(frozen=True)
class Row:
    """A line of a table of numbers: ``value`` None where it was ``skipped``, or is not a number."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    skipped: str = ""


def _metric_rows(data: ReportData) -> list[Row]:
    """Lists the numbers that have no place of their own on the page, and the reasons for those not measured."""
    dumped = data.model_dump()
    pictures, end_to_end = data.pictures, data.engine_numbers.end_to_end
    return [
        *number_rows(dumped["engine_numbers"], ("end_to_end",)),
        *number_rows(dumped["graph_numbers"], ("block_errors",)),
        *number_rows(dumped["floors"], prefix="floor"),
        *([] if isinstance(pictures, Skipped) else picture_rows(pictures, _SHOWN_ELSEWHERE, "pictures")),
        *([] if isinstance(end_to_end, Skipped) else number_rows(end_to_end.model_dump(), _END_TO_END, "one call")),
    ]


def picture_rows(pictures: PictureNumbers, leave_out: Collection[str] = (), prefix: str = "") -> list[Row]:
    """Lists every number of one schedule's pictures, those of trained networks last."""
    dumped = pictures.model_dump()
    return [*number_rows(dumped, leave_out, prefix), *number_rows(dumped["perceptual"], (), prefix)]


def number_rows(found: Any, leave_out: Collection[str] = (), prefix: str = "") -> Iterator[Row]:  # noqa: ANN401 - JSON
    """Yields every number and every reason for none in nested data, under names such as ``median, psnr``.

    Single values, and what the page draws, are left out: lists, and the keys in ``leave_out``.
    """
    if isinstance(found, Mapping) and "skipped" in found:
        yield Row(prefix, None, skipped=str(found["skipped"]))
    elif isinstance(found, Mapping) and "value" in found:
        yield Row(prefix, _real(found["value"]), _real(found.get("low")), _real(found.get("high")), found.get("n"))
    elif isinstance(found, Mapping):
        for key, value in found.items():
            if key not in _NO_NUMBERS and key not in leave_out:
                words = key.replace("_", " ")
                yield from number_rows(value, (), f"{prefix}, {words}" if prefix else words)
    elif _real(found) is not None:
        yield Row(prefix, _real(found))


def _real(value: Any) -> float | None:  # noqa: ANN401 - JSON
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if real else None


def _number(number: Number, digits: int = 2, unit: str = "") -> str:
    if not math.isfinite(number.value):
        return "not a number"
    return f"{number.value:.{digits}f}" + (f" {unit}" if unit else "")


def _interval(number: Number | Row, digits: int = 2) -> str:
    has_interval = number.low is not None and number.high is not None and math.isfinite(number.low)
    return (f"95 %: {number.low:.{digits}f} to {number.high:.{digits}f}, " if has_interval else "") + f"n = {number.n}"


def _plain(value: object) -> str:
    """Formats a number of any size; a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


# Speed


@dataclass(frozen=True)
class Measure:
    """A line of the table against floating point; texts with their unit."""

    name: str
    baseline: str
    engine: str
    ratio: str


def bench_rows(bench: Mapping[str, Any], digest: str) -> list[Measure]:
    """Lists what ``s2p-deploy bench`` measured of the engine of that digest, and of floating point beside it.

    Raises:
        InputError: the engine is not in the benchmark.
    """
    engine = next((found for found in bench["engines"] if found["digest"] == digest), None)
    if engine is None:
        raise InputError(f"the benchmark has no engine of digest {digest[:16]}: run s2p-deploy bench on this engine")
    base, ratios = bench["baseline"], engine["ratios"] or {}

    def measure(name: str, shown: Callable[[Any], str], ratio: str = "") -> Measure:
        return Measure(name, shown(base), shown(engine), f"{ratios[ratio]:.2f}" if ratio in ratios else "")

    def timed(name: str, shown: Callable[[Any], str], ratio: str) -> Measure:
        found = ratios.get(ratio)
        interval = "" if not found or found["low"] is None else f" ({found['low']:.2f} to {found['high']:.2f})"
        return Measure(name, shown(base), shown(engine), f"{found['value']:.2f}{interval}" if found else "")

    def pictures(engine: Any) -> str:  # noqa: ANN401 - JSON
        return f"{engine['images_per_minute']:.3g}" if engine["images_per_minute"] else "not measured"

    return [
        timed("step, p50", lambda e: f"{e['step_p50']['value'] * 1e3:.4g} ms", "step"),
        measure("step, p95", lambda e: f"{e['step_p95']['value'] * 1e3:.4g} ms"),
        timed("pictures per minute", pictures, "images_per_minute"),
        measure("load, until the first result", lambda e: f"{e['load_seconds']:.2f} s", "load"),
        measure("memory, loaded", lambda e: f"{e['memory']['loaded'] / 1e6:.4g} MB"),
        measure("memory, after all steps", lambda e: f"{e['memory']['steady'] / 1e6:.4g} MB", "steady_memory"),
        measure("memory, peak", lambda e: f"{e['memory']['peak'] / 1e6:.4g} MB", "peak_memory"),
        measure("on disk", lambda e: f"{e['size'] / 1e6:.4g} MB", "size"),
        *(
            Measure(
                f"{gate['name']}, at least {gate['limit']:g}",
                "",
                "unknown" if gate["value"] is None else f"{gate['value']:.3g}",
                "passed" if gate["passed"] else "no gain here: do not deploy",
            )
            for gate in engine["gates"]
        ),
    ]


# Layers


@dataclass(frozen=True)
class Layer:
    """One layer. ``activations`` is its quantizer's format; ``stored_bits``, ``lowering`` and ``compute`` the engine's.

    ``bar`` in (0, 1] is the sensitivity on a logarithmic axis, ``picture_bar`` the pictures' squared error where the
    layer alone is quantized; None where the plan has none. ``mismatch`` and
    ``max_lsb`` are those of the layer's activation quantizer; ``sqnr`` in dB is of the layer cut out of the engine,
    where it was.
    """

    name: str
    op: str
    weights: str
    activations: str
    rule: str
    stored_bits: int | None
    lowering: str
    compute: str
    sensitivity: float | None
    bar: float | None
    picture_error: float | None
    picture_bar: float | None
    mismatch: float | None
    max_lsb: int | None
    sqnr: float | None
    scales: QuantizerScales | None


@dataclass(frozen=True)
class Group:
    """Neighbouring layers of one part of the network, for the axis below the strips."""

    name: str
    count: int


def layers_of(data: ReportData, plan: PrecisionPlan, scales: Sequence[QuantizerScales]) -> list[Layer]:
    """Gathers what is known of every layer of the plan, in module order."""
    precisions = {layer.name: layer for layer in data.engine.layers}
    quantizers, alone = data.graph_numbers.quantizers, data.engine_numbers.layers
    codes = {} if isinstance(quantizers, Skipped) else {codes.quantizer: codes for codes in quantizers}
    sqnrs = {} if isinstance(alone, Skipped) else {layer.name: layer.sqnr for layer in alone}
    formats = {quantizer.name: quantizer.activations for quantizer in plan.activation_quantizers}
    lines = {quantizer.name: quantizer for quantizer in scales}
    layers = []
    bars = _bars([layer.sensitivity for layer in plan.layers])
    picture_bars = _bars([layer.picture_error for layer in plan.layers])
    for planned, bar, picture_bar in zip(plan.layers, bars, picture_bars, strict=True):
        quantizer, precision = planned.activation_quantizer or "", precisions.get(planned.name)
        compared = codes.get(quantizer)
        layers.append(
            Layer(
                name=planned.name,
                op=planned.op,
                weights=planned.weights,
                activations=formats.get(quantizer, _FLOATING),
                rule=planned.rule,
                stored_bits=precision.weight_storage_bits if precision else None,
                lowering=precision.lowering if precision else "",
                compute=precision.compute if precision else "",
                sensitivity=planned.sensitivity,
                bar=bar,
                picture_error=planned.picture_error,
                picture_bar=picture_bar,
                mismatch=compared.mismatch if compared else None,
                max_lsb=compared.max_lsb if compared else None,
                sqnr=_real(sqnrs.get(planned.name)),
                scales=lines.get(quantizer),
            )
        )
    return layers


def groups_of(layers: Sequence[Layer]) -> list[Group]:
    """Groups runs of layers in the same part: ``down_blocks.0``, ``mid_block``, ``time_embedding``."""

    def part(layer: Layer) -> str:
        first, *rest = layer.name.split(".")
        return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first

    return [Group(name, len(list(run))) for name, run in groupby(layers, part)]


def _bars(values: Sequence[float | None]) -> list[float | None]:
    """Computes heights between the smallest and the largest value above zero, logarithmic."""
    logs = [None if value is None else math.log10(max(value, 1e-30)) for value in values]
    above = [math.log10(value) for value in values if value is not None and value > 0]
    if not above:
        return [None if log is None else _LEAST_BAR for log in logs]
    low, reach = min(above), max(max(above) - min(above), 1e-9)
    return [None if log is None else _LEAST_BAR + (1 - _LEAST_BAR) * max(0.0, log - low) / reach for log in logs]


# Pictures


def shown_pairs(pairs: PicturePairs, psnr: Sequence[float]) -> list[dict[str, Any]]:
    """Prepares at most :data:`MOST_PAIRS` of the pairs, evenly spread over the PSNR, worst first."""
    scores = np.nan_to_num(np.asarray(psnr, np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    order = np.argsort(scores, kind="stable")
    shown = order[np.linspace(0, len(order) - 1, min(MOST_PAIRS, len(order))).round().astype(np.int64)]
    return [
        {
            "index": index,
            "text": pairs.texts[index],
            "psnr": _real(psnr[index]),
            "reference": thumbnail(pairs.reference[index]),
            "candidate": thumbnail(pairs.candidate[index]),
            "difference": thumbnail(difference(pairs.reference[index], pairs.candidate[index])),
        }
        for index in shown.tolist()
    ]


def difference(reference: NDArray[np.uint8], candidate: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Computes the absolute difference of two pictures, :data:`AMPLIFICATION` times amplified."""
    gap = np.abs(reference.astype(np.int16) - candidate)
    amplified: NDArray[np.uint8] = np.minimum(gap * AMPLIFICATION, 255).astype(np.uint8)
    return amplified


def thumbnail(picture: NDArray[np.uint8]) -> str:
    """Encodes a picture uint8 [H, W, 3] as a data address: a small one as it is, a large one as a smaller JPEG."""
    from PIL import Image

    if max(picture.shape[:2]) <= _PNG_SIDE:
        return data_uri(picture)
    image = Image.fromarray(picture)
    image.thumbnail((_JPEG_SIDE, _JPEG_SIDE))
    return _address(image, "JPEG", quality=_JPEG_QUALITY, optimize=True)


def data_uri(picture: NDArray[np.uint8]) -> str:
    """Encodes a picture uint8 [H, W, 3] as the data address of a PNG, smaller where it is large."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    return _address(image, "PNG", optimize=True)


def _address(image: Image, form: str, **options: Any) -> str:  # noqa: ANN401 - Pillow's options of a format
    out = io.BytesIO()
    image.save(out, format=form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(out.getvalue()).decode("ascii")
