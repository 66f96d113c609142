"""The report's figures as inline SVG, drawn in the page's own text colour so that they read on light and dark."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from s2p_deploy.records import ScaleTable
    from s2p_deploy.validation.measurements import BlockAgreement, EndToEnd, PictureComparison

_INK = "#010203"  # stands for the page's text colour until the figure is text
FIRST, SECOND, YARDSTICK = "#2f7ed8", "#e07b28", "#c0392b"
_WIDTH, _HEIGHT = 5.2, 3.0  # inches: its text stays readable where a phone shows it at full width
_MAX_ROWS = 100  # of the heat map


def psnr_figure(comparison: PictureComparison) -> str:
    """PSNR of every picture, worst first, over what a one-pixel shift scores."""
    values = np.sort(comparison.similarity.psnr)

    def draw(axes: Any) -> None:  # noqa: ANN401 - matplotlib's Axes, which is imported late
        axes.plot(range(1, len(values) + 1), values, ".", color=FIRST, label="engine")
        shift = float(np.median(comparison.pixel_shift.psnr))
        axes.axhline(shift, color=YARDSTICK, linestyle="--", label="one-pixel shift (median)")
        axes.set(xlabel="picture, worst first", ylabel="PSNR to FP, dB")
        legend(axes)

    return svg("psnr", draw)


def trajectory_figure(comparison: PictureComparison) -> str:
    """Relative error of the latents after every call of the denoiser: median and the middle 80 % of the pictures."""
    low, median, high = np.quantile(comparison.step_error, (0.1, 0.5, 0.9), axis=1)
    calls = np.arange(1, len(median) + 1)

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        floor = 1e-9  # a logarithmic axis shows no zero
        axes.fill_between(calls, np.maximum(low, floor), np.maximum(high, floor), color=FIRST, alpha=0.25, linewidth=0)
        axes.semilogy(calls, np.maximum(median, floor), color=FIRST)
        axes.set(xlabel="call of the denoiser", ylabel="latent error, relative to FP")

    return svg("trajectory", draw)


def timestep_figure(found: EndToEnd) -> str:
    """SQNR to FP of one call at each validation latent, by timestep: fake-quant and engine."""

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        axes.plot(found.rows, found.fake_quant, "o", color=FIRST, markersize=5, alpha=0.6, label="fake-quant")
        axes.plot(found.rows, found.engine, "x", color=SECOND, markersize=5, label="engine")
        axes.set(xlabel="timestep", ylabel="SQNR to FP, dB")
        legend(axes)

    return svg("timestep", draw)


def block_figure(graph: Sequence[BlockAgreement], engine: Sequence[BlockAgreement], limit: float) -> str:
    """SQNR of every block fed the reference's inputs: the graph's and the engine's."""

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for blocks, marker, color, label in ((graph, "o", FIRST, "graph"), (engine, "x", SECOND, "engine")):
            axes.plot([b.sqnr for b in blocks], [b.block for b in blocks], marker, color=color, label=label)
        axes.axvline(limit, color=YARDSTICK, linestyle="--", label="gate")
        axes.invert_yaxis()
        axes.set(xlabel="SQNR to fake-quant, dB")
        legend(axes)

    return svg("blocks", draw, height=0.9 + 0.2 * max(len(graph), len(engine)))


def scales_figure(table: ScaleTable) -> str:
    """Every act point's scale over the calibrated timesteps, as log2 of its ratio to the point's centre."""
    rows = np.asarray(table.trained, dtype=np.int64)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MAX_ROWS)).round().astype(np.int64)]
    ratios: NDArray[np.float64] = np.log2(table.scales[rows].astype(np.float64) / table.centres)
    reach = max(float(np.abs(ratios).max()), 1e-3)

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        picture = axes.imshow(ratios.T, aspect="auto", cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
        ticks = np.linspace(0, len(rows) - 1, 5).round().astype(int)
        axes.set_xticks(ticks, [str(rows[tick]) for tick in ticks])
        axes.set(xlabel="timestep", ylabel="act point, in module order")
        axes.figure.colorbar(picture, label="log2(scale / centre)")

    return svg("scales", draw, height=3.6)


def legend(axes: Any) -> None:  # noqa: ANN401 - as above
    """Above the axes, where it covers no point."""
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, handletextpad=0.3)


def svg(name: str, draw: Callable[[Any], None], height: float = _HEIGHT) -> str:
    """One figure as an ``<svg>`` element; ``name`` keeps the ids of several figures in one page apart."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "font.family": "sans-serif"}
    with mpl.rc_context(style | ink | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue().replace(_INK, "currentColor")
    return re.sub(r"^.*?(?=<svg)", "", text, count=1, flags=re.DOTALL)
