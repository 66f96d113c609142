"""The report's figures as inline SVG, drawn in the page's own text colour so that they read on light and dark.

Each is drawn from the data of ``report.json``, where None stands for what is not finite.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.validation.compare_figures import shown_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

_INK = "#010203"  # stands for the page's text colour until the figure is text
FIRST, SECOND, YARDSTICK = "#2f7ed8", "#e07b28", "#c0392b"
_OTHERS = ("#3a9d5d", "#a04ac7", "#17a2b8", "#8c6d46")
WIDTH, _HEIGHT = 5.2, 3.0  # inches: its text stays readable where a phone shows it at full width
_FLOOR = 1e-9  # a logarithmic axis shows no zero


def psnr_figure(psnr: Iterable[float | None], shift: float | None) -> str:
    """PSNR of every picture, worst first, over ``shift``, what a one-pixel shift scores."""
    values = np.sort(_numbers(psnr))

    def draw(axes: Any) -> None:  # noqa: ANN401 - matplotlib's Axes, which is imported late
        axes.plot(range(1, len(values) + 1), values, ".", color=FIRST, label="engine")
        if shift is not None:
            axes.axhline(shift, color=YARDSTICK, linestyle="--", label="one-pixel shift (median)")
        axes.set(xlabel="picture, worst first", ylabel="PSNR to FP, dB")
        legend(axes)

    return svg("psnr", draw)


def trajectory_figure(errors: Mapping[str, Mapping[str, Any]], span: tuple[float, float]) -> str:
    """Relative error of the latents along free-running trajectories: median, and the first one's middle 80 %.

    Args:
        errors: ``step_error`` of every schedule that was drawn, by its label.
        span: first and last timestep of the axis, from noise to picture.
    """
    first = next(iter(errors))

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for number, (label, error) in enumerate(errors.items()):
            color = FIRST if label == first else _OTHERS[(number - 1) % len(_OTHERS)]
            low, median, high = (np.maximum(_numbers(error[key]), _FLOOR) for key in ("p10", "median", "p90"))
            if label == first:
                axes.fill_between(error["timestep"], low, high, color=color, alpha=0.25, linewidth=0)
            axes.semilogy(error["timestep"], median, color=color, label=shown_names([label])[0])
        axes.set(xlabel="timestep, from noise to picture", ylabel="latent error, relative to FP", xlim=span)
        legend(axes)

    return svg("trajectory", draw)


def timestep_figure(rows: Sequence[int], lines: Mapping[str, Sequence[float | None]], span: tuple[float, float]) -> str:
    """SQNR to FP of one call at each stored latent, by the row that it sits on, and the median of every row."""

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for (label, values), color in zip(lines.items(), (FIRST, SECOND), strict=False):
            found = _numbers(values)
            axes.plot(rows, found, ".", color=color, markersize=4, alpha=0.45)
            axes.plot(*_medians(np.asarray(rows), found), color=color, linewidth=1.2, label=label)
        axes.set(xlabel="timestep, from noise to picture", ylabel="SQNR to FP, dB", xlim=span)
        legend(axes)

    return svg("timestep", draw)


def block_figure(
    graph: Sequence[Mapping[str, Any]], engine: Sequence[Mapping[str, Any]], limits: Mapping[str, float | None]
) -> str:
    """SQNR of every block fed the reference's inputs, the graph's and the engine's, and what the gate asks of it."""

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for blocks, marker, color, label in ((graph, "o", FIRST, "graph"), (engine, "x", SECOND, "engine")):
            names = shown_names([str(block["block"]) for block in blocks])
            axes.plot(_numbers(block["sqnr"] for block in blocks), names, marker, color=color, label=label)
        asked = _numbers(limits.get(str(block["block"])) for block in graph)
        axes.plot(
            asked,
            shown_names([str(block["block"]) for block in graph]),
            "|",
            color=YARDSTICK,
            markersize=9,
            markeredgewidth=2,
            label="gate",
        )
        axes.invert_yaxis()
        axes.set(xlabel="SQNR to fake-quant, dB")
        legend(axes)

    return svg("blocks", draw, height=0.9 + 0.2 * max(len(graph), len(engine)))


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
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue().replace(_INK, "currentColor")
    return re.sub(r"^.*?(?=<svg)", "", text, count=1, flags=re.DOTALL)


def _medians(rows: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The distinct rows, and the median of the values on each."""
    distinct = np.unique(rows)
    return distinct, np.array([np.median(values[rows == row]) for row in distinct])


def _numbers(values: Iterable[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)
