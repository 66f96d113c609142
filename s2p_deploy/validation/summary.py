"""Measurements as the JSON-ready data of ``report.json``; the HTML page shows the same data."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.validation.measurements import Perceptual
from s2p_deploy.validation.numbers import Number, Skipped, mean_of, median_of

if TYPE_CHECKING:
    from s2p_deploy.validation.measurements import Agreement, EndToEnd, Measurements, PictureComparison

_SIMILARITIES = ("psnr", "ssim", "haarpsi")


def summary(found: Measurements) -> dict[str, Any]:
    """All numbers with their n, and for pictures also the single values."""
    perceptual = _perceptual(found.perceptual)
    skipped = {name: value["skipped"] for name, value in perceptual.items() if "skipped" in value}
    pictures = _or_skipped(found.pictures, _pictures)
    if "skipped" not in pictures:
        pictures |= {name: value for name, value in perceptual.items() if name not in skipped}
    return {
        "graph_numbers": {
            "points": plain(found.points),
            "blocks": plain(found.graph_blocks),
            "block_errors": plain(found.block_errors),
        },
        "engine_numbers": {
            "blocks": plain(found.engine_blocks),
            "sites": plain(found.engine_sites),
            "end_to_end": _or_skipped(found.end_to_end, _end_to_end),
        },
        "floors": {floor.name: _or_skipped(floor.agreement, _agreement) for floor in found.floors},
        "pictures": pictures,
        "other_schedules": [_pictures(one) for one in found.other_schedules],
        "not_run": skipped,
    }


def plain(value: Any) -> Any:  # noqa: ANN401 - a walk over nested data
    """Nested records, arrays and tuples as dictionaries, lists and numbers; what is not finite becomes None."""
    if isinstance(value, Skipped):
        return {"skipped": value.reason}
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _or_skipped(value: Any, make: Any) -> Any:  # noqa: ANN401 - either of two records, and its function
    return plain(value) if isinstance(value, Skipped) else make(value)


def _end_to_end(found: EndToEnd) -> dict[str, Any]:
    data: dict[str, Any] = plain(
        {
            "fake_quant_to_fp": mean_of(found.fake_quant),
            "engine_to_fp": mean_of(found.engine),
            "change": mean_of(found.change),
            "engine_to_fake_quant": mean_of(found.engine_to_fake_quant),
            "floor_fp32_to_fp64": mean_of(found.floor),
            "floor_change": Number(found.floor_change, len(found.floor)),
            "cosine": _cosines(found),
            "rows": found.rows,
            "values": {"fake_quant_to_fp": found.fake_quant, "engine_to_fp": found.engine},
        }
    )
    return data


def _cosines(found: EndToEnd) -> dict[str, Number]:
    if found.cosines is None:
        return {}
    fake_quant, engine = found.cosines
    return {"fake_quant_to_fp": mean_of(fake_quant), "engine_to_fp": mean_of(engine)}


def _agreement(found: Agreement) -> dict[str, Any]:
    data: dict[str, Any] = plain({"sqnr": mean_of(found.sqnr), "cosine": mean_of(found.cosine)})
    return data


def _perceptual(found: Perceptual | Skipped) -> dict[str, Any]:
    """By metric, under its name: a number, two of them, or why there is none."""
    names = [field.name for field in fields(Perceptual)]
    if isinstance(found, Skipped):
        return dict.fromkeys(names, plain(found))
    values = {name: getattr(found, name) for name in names}
    if isinstance(found.lpips, np.ndarray):
        values["lpips"] = {"median": median_of(found.lpips), "mean": mean_of(found.lpips)}
    if isinstance(found.clip_score, np.ndarray):
        reference, candidate = found.clip_score
        means = {"fp": mean_of(reference), "engine": mean_of(candidate)}
        values["clip_score"] = means | {"change": mean_of(candidate - reference)}
    named: dict[str, Any] = plain(values)
    return named


def _pictures(found: PictureComparison) -> dict[str, Any]:
    low, median, high = np.quantile(found.step_error, (0.1, 0.5, 0.9), axis=1)
    accuracy = found.accuracy
    data: dict[str, Any] = plain(
        {
            "n": len(found.similarity.psnr),
            "scheduler": found.schedule.scheduler or "pipeline's own",
            "steps": found.schedule.steps,
            "guidance_scale": found.guidance_scale,
            "median": {name: median_of(getattr(found.similarity, name)) for name in _SIMILARITIES},
            "pixel_shift_median": {name: median_of(getattr(found.pixel_shift, name)) for name in _SIMILARITIES},
            "accuracy": accuracy if isinstance(accuracy, Skipped) else {"fp": accuracy[0], "engine": accuracy[1]},
            "feature_distance": found.feature_distance,
            "step_error": {"timestep": found.timesteps, "p10": low, "median": median, "p90": high},
            "seconds_per_picture": {"fp": found.seconds[0], "engine": found.seconds[1]},
            "values": {name: getattr(found.similarity, name) for name in _SIMILARITIES},
        }
    )
    return data
