"""The report's figures as inline SVG, drawn in the page's own text colour so that they read on light and dark."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from s2p_deploy.records import ScaleTable
    from s2p_deploy.validation.measurements import BlockAgreement
    from s2p_deploy.validation.report import StepErrors

    Log = list[dict[str, Any]]

_INK = "#010203"  # stands for the page's text colour until the figure is text
FIRST, SECOND, YARDSTICK = "#2f7ed8", "#e07b28", "#c0392b"
_OTHERS = ("#3a9d5d", "#a04ac7", "#17a2b8", "#8c6d46")
WIDTH, _HEIGHT = 5.2, 3.0  # inches: its text stays readable where a phone shows it at full width
_LONGEST = 40  # letters of a name
_FLOOR = 1e-9  # a logarithmic axis shows no zero
_MOST_TIMESTEPS = 100
_FEWEST = 2  # quantizers and timesteps that make a heat map
CHARACTERISTIC = (SECOND, FIRST, "#3a9d5d")  # colours of the lines that stand out before one is chosen
HEAT, LINE = "scale-heat", "scale-line-"  # ids that the page's script looks for
_SPARK_WIDTH, _SPARK_HEIGHT = 72, 18


def psnr_figure(psnr: Sequence[float], shift: float) -> str:
    """Draws PSNR of every picture, worst first, over ``shift``, the PSNR of a one-pixel shift."""
    values = np.sort(np.asarray(psnr, np.float64))

    def draw(axes: Any) -> None:  # noqa: ANN401 - matplotlib's Axes, which is imported late
        axes.plot(range(1, len(values) + 1), values, ".", color=FIRST, label="engine")
        if np.isfinite(shift):
            axes.axhline(shift, color=YARDSTICK, linestyle="--", label="one-pixel shift (median)")
        axes.set(xlabel="picture, worst first", ylabel="PSNR to FP, dB")
        legend(axes)

    return svg("psnr", draw)


def trajectory_figure(errors: Mapping[str, StepErrors], span: tuple[float, float]) -> str:
    """Draws the relative error of latents along free-running trajectories: median, and the first's middle 80 %.

    Args:
        errors: those of every schedule that was drawn, by its label.
        span: first and last timestep of the axis, from noise to picture.
    """
    first = next(iter(errors))

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for number, (label, error) in enumerate(errors.items()):
            color = FIRST if label == first else _OTHERS[(number - 1) % len(_OTHERS)]
            low, median, high = (np.maximum(line, _FLOOR) for line in (error.p10, error.median, error.p90))
            if label == first:
                axes.fill_between(error.timestep, low, high, color=color, alpha=0.25, linewidth=0)
            axes.semilogy(error.timestep, median, color=color, label=shown_names([label])[0])
        axes.set(xlabel="timestep, from noise to picture", ylabel="latent error, relative to FP", xlim=span)
        legend(axes)

    return svg("trajectory", draw)


def timestep_figure(indices: Sequence[int], lines: Mapping[str, Sequence[float]], span: tuple[float, float]) -> str:
    """Draws SQNR to FP of one call at each stored latent, by its timestep index, and the median of every index."""

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for (label, values), color in zip(lines.items(), (FIRST, SECOND), strict=False):
            found = np.asarray(values, np.float64)
            axes.plot(indices, found, ".", color=color, markersize=4, alpha=0.45)
            axes.plot(*_medians(np.asarray(indices), found), color=color, linewidth=1.2, label=label)
        axes.set(xlabel="timestep, from noise to picture", ylabel="SQNR to FP, dB", xlim=span)
        legend(axes)

    return svg("timestep", draw)


def block_figure(graph: Sequence[BlockAgreement], engine: Sequence[BlockAgreement], limits: Mapping[str, float]) -> str:
    """Draws SQNR of every block fed the reference's inputs, the graph's and the engine's, and the gate's limit."""

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for blocks, marker, color, label in ((graph, "o", FIRST, "graph"), (engine, "x", SECOND, "engine")):
            names = shown_names([block.block for block in blocks])
            axes.plot([block.sqnr for block in blocks], names, marker, color=color, label=label)
        asked = [limits.get(block.block, np.nan) for block in graph]
        axes.plot(
            asked,
            shown_names([block.block for block in graph]),
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


def shown_names(names: Sequence[str]) -> list[str]:
    """Returns names that matplotlib takes as they are: no formulas, no control characters, none too long or hidden."""
    printable = ("".join(c if c.isprintable() else " " for c in name) for name in names)
    cut = (name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…" for name in printable)
    return [(" " + name if name.startswith("_") else name).replace("$", r"\$") for name in cut]


def legend(axes: Any) -> None:  # noqa: ANN401 - as above
    """Puts a legend above the axes, where it covers nothing."""
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, handletextpad=0.3)


def svg(name: str, draw: Callable[[Any], None], height: float = _HEIGHT) -> str:
    """Renders one figure as an ``<svg>`` element; ``name`` keeps the ids of several figures in one page apart."""
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


def _medians(indices: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the distinct timestep indices, and the median of the values at each."""
    distinct = np.unique(indices)
    return distinct, np.array([np.median(values[indices == index]) for index in distinct])


@dataclass(frozen=True)
class QuantizerScales:
    """One quantizer: its column, its smallest and largest scale over the timesteps, its colour if it stands out."""

    column: int
    name: str
    low: float
    high: float
    color: str | None
    spark: str

    @property
    def swing(self) -> float:
        """Computes the largest scale over the smallest."""
        return self.high / self.low


def drawable(table: ScaleTable) -> bool:
    """Tells whether there is anything over time to draw."""
    return len(table.quantizers) >= _FEWEST and len(table.calibrated) >= _FEWEST


def scales_figures(table: ScaleTable, span: tuple[float, float]) -> dict[str, str]:
    """Draws the heat map and the lines; the x axis runs over ``span``, from noise to picture."""
    indices = _drawn_indices(table)
    ratios = np.log2(table.scales[indices].astype(np.float64) / table.reference_scales)
    return {"scales": _heat(indices, ratios), "lines": _lines(indices, ratios, characteristic(table), span)}


def quantizer_scales(table: ScaleTable) -> list[QuantizerScales]:
    """Describes every activation quantizer in the table's order."""
    if not drawable(table):
        return []
    scales = table.scales[_drawn_indices(table)].astype(np.float64)
    colors = dict(zip(characteristic(table), CHARACTERISTIC, strict=False))
    return [
        QuantizerScales(
            column,
            name,
            float(scales[:, column].min()),
            float(scales[:, column].max()),
            colors.get(column),
            _spark(scales[:, column]),
        )
        for column, name in enumerate(table.quantizers)
    ]


def characteristic(table: ScaleTable) -> tuple[int, ...]:
    """Chooses the columns that change most, as the median, and least; fewer where there are fewer."""
    scales = table.scales[_drawn_indices(table)]
    order = np.argsort(scales.max(0) / scales.min(0), kind="stable")[::-1]
    return tuple(dict.fromkeys(int(order[place]) for place in (0, len(order) // 2, len(order) - 1)))


def _drawn_indices(table: ScaleTable) -> NDArray[np.int64]:
    """Chooses trained timestep indices, not too many, the noisiest first."""
    indices = np.sort(np.asarray(table.calibrated, dtype=np.int64))[::-1]
    return indices[np.linspace(0, len(indices) - 1, min(len(indices), _MOST_TIMESTEPS)).round().astype(np.int64)]


def _heat(indices: NDArray[np.int64], ratios: NDArray[np.float64]) -> str:
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    reach = max(float(np.abs(ratios).max()), 1e-3)
    stops = (0, to_rgba(FIRST)), (0.5, to_rgba(FIRST, 0)), (0.5, to_rgba(SECOND, 0)), (1, to_rgba(SECOND))
    ramp = LinearSegmentedColormap.from_list("scales", stops)  # what does not change shows the page itself

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        picture = axes.imshow(ratios.T, aspect="auto", cmap=ramp, vmin=-reach, vmax=reach, interpolation="none")
        picture.set_gid(HEAT)
        ticks = np.linspace(0, len(indices) - 1, min(5, len(indices))).round().astype(int)
        axes.set_xticks(ticks, [str(indices[tick]) for tick in ticks])
        axes.set(xlabel="timestep, from noise to picture", ylabel="activation quantizer, in module order")
        bar = axes.figure.colorbar(picture, label="log2(scale / reference scale)")
        bar.ax.patch.set_visible(False)

    return svg("scales", draw, height=3.6)


def _lines(
    indices: NDArray[np.int64], ratios: NDArray[np.float64], chosen: Sequence[int], span: tuple[float, float]
) -> str:
    colors = dict(zip(chosen, CHARACTERISTIC, strict=False))

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for column in range(ratios.shape[1]):
            look: dict[str, Any] = {"color": "#808080", "linewidth": 0.7, "alpha": 0.3, "zorder": 2}
            if column in colors:
                look = {"color": colors[column], "linewidth": 1.8, "zorder": 3}
            (line,) = axes.plot(indices, ratios[:, column], **look)
            line.set_gid(f"{LINE}{column}")
        axes.set(xlabel="timestep, from noise to picture", ylabel="log2(scale / reference scale)", xlim=span)

    return svg("lines", draw, height=3.6)


def _spark(values: NDArray[np.float64]) -> str:
    """Returns the points of a polyline within 72 by 18; it starts at the noise."""
    low, high = float(values.min()), float(values.max())
    x = np.linspace(1, _SPARK_WIDTH - 1, len(values))
    y = np.full(len(values), _SPARK_HEIGHT / 2)
    if high > low:
        y = 1 + (_SPARK_HEIGHT - 2) * (high - values) / (high - low)
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def read_training_log(folder: Path) -> Log:
    """Reads the lines of ``training.jsonl`` of a calibrated model; none where it was not trained."""
    file = folder / "training.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def training_figures(log: Log) -> dict[str, str]:
    """Draws the figures that the log allows, by name: loss, SQNR per timestep, weights that oscillate."""
    iterations = [line for line in log if line["kind"] == "iteration"]
    if not iterations:
        return {}
    drawn = {"loss": _loss(iterations, [line for line in log if line["kind"] == "selection"])}
    drawn["rows"] = _sqnr_by_timestep([line for line in log if line["kind"] == "timesteps"])
    if "oscillating" in iterations[0]:
        drawn["oscillation"] = _oscillation(iterations)
    return drawn


def _loss(iterations: Log, selections: Log) -> str:
    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        axes.semilogy([line["iteration"] for line in iterations], [line["loss"] for line in iterations], color=FIRST)
        axes.set(xlabel="iteration", ylabel="training loss")
        if selections:
            errors = axes.twinx()
            errors.plot([s["iteration"] for s in selections], [s["error"] for s in selections], "o-", color=SECOND)
            errors.set_ylabel("error of held-out trajectories")

    return svg("loss", draw)


def _sqnr_by_timestep(measured: Log) -> str:
    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for line, color, label in zip(measured, (FIRST, SECOND), ("before training", "after"), strict=False):
            axes.plot(line["timestep_indices"], line["sqnr_db"], color=color, label=label)
        axes.set(xlabel="timestep", ylabel="SQNR to FP, dB")
        legend(axes)

    return svg("rows", draw)


def _oscillation(iterations: Log) -> str:
    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for key, color in (("oscillating", FIRST), ("frozen", SECOND)):
            axes.plot([line["iteration"] for line in iterations], [line[key] for line in iterations], color, label=key)
        axes.set(xlabel="iteration", ylabel="weights")
        legend(axes)

    return svg("oscillation", draw)
