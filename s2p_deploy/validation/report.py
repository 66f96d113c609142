"""The report's page: one self-contained HTML file. Everything that came from outside is shown as text."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from s2p_deploy.validation import figures
from s2p_deploy.validation.figures_scales import CHARACTERISTIC, drawable, point_scales, scales_figures
from s2p_deploy.validation.report_layers import groups_of, layers_of
from s2p_deploy.validation.report_numbers import bench_rows, number_rows
from s2p_deploy.validation.report_pictures import AMPLIFICATION, shown_pairs
from s2p_deploy.validation.training_figures import training_figures

if TYPE_CHECKING:
    from collections.abc import Mapping

    from s2p_deploy.records import ExportedGraph, ScaleTable
    from s2p_deploy.validation.report_pictures import Pairs
    from s2p_deploy.validation.training_figures import Log

_SHOWN_PICTURE_KEYS = ("accuracy", "feature_distance", "median", "pixel_shift_median")
_SHOWN_END_TO_END = (
    ("fake_quant_to_fp", "fake-quant to FP"),
    ("engine_to_fp", "engine to FP"),
    ("change", "change: engine less fake-quant"),
    ("engine_to_fake_quant", "engine to fake-quant"),
    ("floor_fp32_to_fp64", "floor: fake-quant in FP32 to itself in FP64"),
    ("floor_change", "floor: the change that FP64 alone makes"),
)


def render_html(
    data: Mapping[str, Any],
    graph: ExportedGraph,
    pairs: Pairs | None,
    *,
    training: Log | None = None,
) -> str:
    """The page of a report.

    Args:
        data: what ``report.json`` holds; under ``bench`` what ``s2p-deploy bench --json`` printed, where it was given.
        graph: the exported graph, for its plan and its scales.
        pairs: the pictures, or None where none were drawn.
        training: lines of the calibrated model's ``training.jsonl``.

    Raises:
        InputError: the benchmark knows nothing of this engine.
    """
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    bench = data.get("bench")
    drawn = _figures(data, graph.scales) | training_figures(training or [])
    scales = point_scales(graph.scales)
    layers = layers_of(data, graph.plan, scales)
    environment = Environment(
        loader=PackageLoader("s2p_deploy.validation"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        data=data,
        headline=_headline(data),
        pictures=_pictures(data),
        pairs=shown_pairs(pairs, data["pictures"]["values"]["psnr"]) if pairs and _pictures(data) else [],
        amplification=AMPLIFICATION,
        figures={name: Markup(svg) for name, svg in drawn.items()},  # our own
        script=Markup(script()),  # our own, and the policy names its hash
        script_hash=script_hash(),
        scales=scales,
        characteristic=[point for color in CHARACTERISTIC for point in scales if point.color == color],
        layers=layers,
        groups=groups_of(layers),
        computes=Counter(layer.compute for layer in layers if layer.compute).most_common(),
        metrics=_metric_rows(data),
        end_to_end=_end_to_end_rows(data),
        bench=bench,
        bench_rows=bench_rows(bench, data["digests"]["engine"]) if bench else [],
    )


@cache
def script() -> str:
    """The page's script, which holds nothing from outside."""
    return resources.files("s2p_deploy.validation").joinpath("templates/report.js").read_text(encoding="utf-8")


def script_hash() -> str:
    """What the content security policy allows to run: ``sha256-...``."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script().encode("utf-8")).digest()).decode("ascii")


def _headline(data: Mapping[str, Any]) -> str:
    verdict = {
        "passed": "The engine draws the same pictures",
        "failed": "The engine failed a gate",
        "not verified": "Not everything could be verified here",
    }[data["verdict"]]
    pictures = _pictures(data)
    if pictures is None or pictures["median"]["psnr"]["value"] is None:
        return verdict
    psnr = pictures["median"]["psnr"]["value"]
    return f"{verdict}: {pictures['n']} prompts, {pictures['steps']} steps, median {psnr:.1f} dB PSNR"


def _pictures(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return None if "skipped" in data["pictures"] else data["pictures"]


def _end_to_end(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] = data["engine_numbers"]["end_to_end"]
    return None if "skipped" in found else found


def _figures(data: Mapping[str, Any], scales: ScaleTable) -> dict[str, str]:
    drawn: dict[str, str] = {}
    pictures, end_to_end, span = _pictures(data), _end_to_end(data), _span(data, scales)
    if pictures is not None:
        shift = pictures["pixel_shift_median"]["psnr"]["value"]
        drawn["psnr"] = figures.psnr_figure(pictures["values"]["psnr"], shift)
        drawn["trajectory"] = figures.trajectory_figure(_step_errors(data), span)
    if end_to_end is not None:
        labels = {"fake-quant": "fake_quant_to_fp", "engine": "engine_to_fp"}
        lines = {label: end_to_end["values"][key] for label, key in labels.items()}
        drawn["timestep"] = figures.timestep_figure(end_to_end["rows"], lines, span)
    blocks = data["graph_numbers"]["blocks"], data["engine_numbers"]["blocks"]
    graph, engine = ([] if isinstance(found, dict) else found for found in blocks)
    if graph:
        limits = data.get("block_limits") or {block["block"]: data["recipe"]["block_sqnr"] for block in graph}
        drawn["blocks"] = figures.block_figure(graph, engine, limits)
    return drawn | (scales_figures(scales, span) if drawable(scales) else {})


def _step_errors(data: Mapping[str, Any]) -> dict[str, Any]:
    """The free-running errors of every schedule that was drawn, the recipe's first."""
    drawn = (data["pictures"], *data.get("other_schedules", ()))
    return {f"{one['scheduler']}, {one['steps']} steps": one["step_error"] for one in drawn}


def _span(data: Mapping[str, Any], scales: ScaleTable) -> tuple[float, float]:
    """The timesteps that the figures show side by side, from noise to picture."""
    pictures, end_to_end = _pictures(data), _end_to_end(data)
    found = [*scales.trained, *(end_to_end["rows"] if end_to_end else ())]
    found += pictures["step_error"]["timestep"] if pictures else ()
    margin = 0.02 * max(max(found, default=1) - min(found, default=0), 1)
    return max(found, default=1) + margin, min(found, default=0) - margin


def _metric_rows(data: Mapping[str, Any]) -> list[Any]:
    """Numbers that have no place of their own on the page, and the reasons for those that were not measured."""
    rows = [
        *number_rows(data["engine_numbers"], ("end_to_end",)),
        *number_rows(data["graph_numbers"]),
        *number_rows(data.get("floors", {}), prefix="floor"),
        *number_rows(_pictures(data) or {}, _SHOWN_PICTURE_KEYS, "pictures"),
    ]
    known = dict(_SHOWN_END_TO_END)
    rows += number_rows(_end_to_end(data) or {}, known, "one call")
    return rows


def _end_to_end_rows(data: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found = _end_to_end(data)
    return [(label, found[key]) for key, label in _SHOWN_END_TO_END if key in found] if found else []
