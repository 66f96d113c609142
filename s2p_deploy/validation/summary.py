"""Measurements as the JSON-ready data of ``report.json``; the HTML page shows the same data."""

from __future__ import annotations

import math
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.validation.numbers import Number, Skipped, mean_of, median_of

if TYPE_CHECKING:
    from s2p_deploy.validation.measurements import EndToEnd, Measurements, PictureComparison

NO_WEIGHTS = "no local weights given"
_NOT_RUN = ("lpips", "fid", "sfid", "fid_clip", "clip_score")


def summary(found: Measurements) -> dict[str, Any]:
    """All numbers with their n, and for pictures also the single values."""
    return {
        "graph_numbers": {"points": plain(found.points), "blocks": plain(found.graph_blocks)},
        "engine_numbers": {
            "blocks": plain(found.engine_blocks),
            "end_to_end": _or_skipped(found.end_to_end, _end_to_end),
        },
        "pictures": _or_skipped(found.pictures, _pictures),
        "other_schedules": [_pictures(one) for one in found.other_schedules],
        "not_run": dict.fromkeys(_NOT_RUN, NO_WEIGHTS),
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
            "rows": found.rows,
            "values": {"fake_quant_to_fp": found.fake_quant, "engine_to_fp": found.engine},
        }
    )
    return data


def _pictures(found: PictureComparison) -> dict[str, Any]:
    metrics = ("psnr", "ssim", "haarpsi")
    low, median, high = np.quantile(found.step_error, (0.1, 0.5, 0.9), axis=1)
    accuracy = found.accuracy
    data: dict[str, Any] = plain(
        {
            "n": len(found.similarity.psnr),
            "scheduler": found.schedule.scheduler or "pipeline's own",
            "steps": found.schedule.steps,
            "guidance_scale": found.guidance_scale,
            "median": {name: median_of(getattr(found.similarity, name)) for name in metrics},
            "pixel_shift_median": {name: median_of(getattr(found.pixel_shift, name)) for name in metrics},
            "accuracy": accuracy if isinstance(accuracy, Skipped) else {"fp": accuracy[0], "engine": accuracy[1]},
            "feature_distance": found.feature_distance,
            "step_error": {"timestep": found.timesteps, "p10": low, "median": median, "p90": high},
            "seconds_per_picture": {"fp": found.seconds[0], "engine": found.seconds[1]},
            "values": {name: getattr(found.similarity, name) for name in metrics},
        }
    )
    return data
