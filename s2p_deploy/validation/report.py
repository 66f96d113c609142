"""The report's page: one self-contained HTML file. Everything that came from outside is shown as text."""

from __future__ import annotations

import base64
import io
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.validation import figures
from s2p_deploy.validation.measurements import PictureComparison
from s2p_deploy.validation.numbers import Skipped
from s2p_deploy.validation.pictures import to_bytes
from s2p_deploy.validation.training_figures import training_figures

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from s2p_deploy.records import ExportedGraph, PrecisionPlan, PromptSet, ScaleTable, SitePrecision
    from s2p_deploy.validation.measurements import Measurements
    from s2p_deploy.validation.pictures import Drawing
    from s2p_deploy.validation.training_figures import Log

AMPLIFICATION = 16
_SHOWN = 9
_SHOWN_SIDE = 256  # larger pictures are shown smaller; in full they lie in the folder
_FEWEST_POINTS = 2  # that make a heat map


@dataclass(frozen=True)
class Drawings:
    """Both drawings of the same prompts."""

    prompts: PromptSet
    reference: Drawing
    candidate: Drawing


def render_html(
    data: dict[str, Any],
    found: Measurements,
    graph: ExportedGraph,
    precisions: tuple[SitePrecision, ...],
    drawings: Drawings | None,
    training: Log | None = None,
) -> str:
    """The page of a report, from the data of ``report.json`` and what its figures and pictures need."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    drawn = _figures(data, found, graph.scales) | training_figures(training or [])
    environment = Environment(
        loader=PackageLoader("s2p_deploy.validation"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        data=data,
        headline=_headline(data, found),
        pictures=None if isinstance(found.pictures, Skipped) else data["pictures"],
        pairs=_pairs(drawings, found.pictures) if drawings and not isinstance(found.pictures, Skipped) else [],
        amplification=AMPLIFICATION,
        figures={name: Markup(svg) for name, svg in drawn.items()},  # our own
        sites=_site_rows(precisions, graph.plan, found),
        computes=Counter(site.compute for site in precisions).most_common(),
    )


def write_pictures(drawings: Drawings, folder: Path) -> None:
    """Every picture of both as PNG: ``000-fp.png``, ``000-engine.png``, in the prompts' order."""
    from PIL import Image

    folder.mkdir()
    for name, drawing in (("fp", drawings.reference), ("engine", drawings.candidate)):
        for index, picture in enumerate(to_bytes(drawing.pictures)):
            Image.fromarray(picture).save(folder / f"{index:03d}-{name}.png")


def _headline(data: dict[str, Any], found: Measurements) -> str:
    verdict = {
        "passed": "The engine draws the same pictures",
        "failed": "The engine failed a gate",
        "not verified": "Not everything could be verified here",
    }[data["verdict"]]
    if isinstance(found.pictures, Skipped):
        return verdict
    count, psnr = len(found.pictures.similarity.psnr), float(np.median(found.pictures.similarity.psnr))
    return f"{verdict}: {count} prompts, {found.pictures.schedule.steps} steps, median {psnr:.1f} dB PSNR"


def _figures(data: dict[str, Any], found: Measurements, scales: ScaleTable) -> dict[str, str]:
    drawn: dict[str, str] = {}
    if isinstance(found.pictures, PictureComparison):
        drawn |= {"psnr": figures.psnr_figure(found.pictures), "trajectory": figures.trajectory_figure(found.pictures)}
    if not isinstance(found.end_to_end, Skipped):
        drawn["timestep"] = figures.timestep_figure(found.end_to_end)
    if not isinstance(found.graph_blocks, Skipped):
        engine = () if isinstance(found.engine_blocks, Skipped) else found.engine_blocks
        drawn["blocks"] = figures.block_figure(found.graph_blocks, engine, data["recipe"]["block_sqnr"])
    if len(scales.points) >= _FEWEST_POINTS and len(scales.trained) >= _FEWEST_POINTS:
        drawn["scales"] = figures.scales_figure(scales)
    return drawn


def _pairs(drawings: Drawings, comparison: PictureComparison) -> list[dict[str, Any]]:
    """Pictures evenly spread over the PSNR, worst first."""
    psnr = comparison.similarity.psnr
    order = np.argsort(psnr, kind="stable")
    shown = order[np.linspace(0, len(order) - 1, min(_SHOWN, len(order))).round().astype(np.int64)]
    reference, candidate = (to_bytes(drawing.pictures[shown]) for drawing in (drawings.reference, drawings.candidate))
    gap = np.abs(reference.astype(np.int16) - candidate)
    difference = np.minimum(gap * AMPLIFICATION, 255).astype(np.uint8)
    return [
        {
            "text": drawings.prompts.prompts[index].text,
            "psnr": psnr[index],
            "reference": data_uri(reference[place]),
            "candidate": data_uri(candidate[place]),
            "difference": data_uri(difference[place]),
        }
        for place, index in enumerate(shown)
    ]


def _site_rows(precisions: tuple[SitePrecision, ...], plan: PrecisionPlan, found: Measurements) -> list[dict[str, Any]]:
    codes = {} if isinstance(found.points, Skipped) else {point.point: point for point in found.points}
    points = {site.site: codes.get(site.act_point or "") for site in plan.sites}
    return [asdict(precision) | {"codes": points.get(precision.site)} for precision in precisions]


def data_uri(picture: NDArray[np.uint8]) -> str:
    """A picture uint8 [H, W, 3] as a PNG inside an address, smaller where it is large."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
