"""Scales over the timesteps: a heat map of all act points, a line each, and a small line for a table's cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.validation.figures import FIRST, SECOND, svg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from s2p_deploy.records import ScaleTable

_MAX_ROWS = 100
_FEWEST = 2  # points and rows that make a heat map
CHARACTERISTIC = (SECOND, FIRST, "#3a9d5d")  # colours of the lines that stand out before one is chosen
HEAT, LINE = "scale-heat", "scale-line-"  # ids that the page's script looks for
_SPARK_WIDTH, _SPARK_HEIGHT = 72, 18


@dataclass(frozen=True)
class PointScales:
    """One act point: its column, the smallest and largest scale over the timesteps, and its colour if it stands out."""

    column: int
    name: str
    low: float
    high: float
    color: str | None
    spark: str

    @property
    def swing(self) -> float:
        """How many times larger the largest scale is than the smallest."""
        return self.high / self.low


def drawable(table: ScaleTable) -> bool:
    """Whether there is anything over time to draw."""
    return len(table.points) >= _FEWEST and len(table.trained) >= _FEWEST


def scales_figures(table: ScaleTable, span: tuple[float, float]) -> dict[str, str]:
    """The heat map and the lines; the x axis runs over ``span``, from noise to picture."""
    rows = _drawn_rows(table)
    ratios = np.log2(table.scales[rows].astype(np.float64) / table.centres)
    return {"scales": _heat(rows, ratios), "lines": _lines(rows, ratios, characteristic(table), span)}


def point_scales(table: ScaleTable) -> list[PointScales]:
    """Every act point in the table's order."""
    if not drawable(table):
        return []
    scales = table.scales[_drawn_rows(table)].astype(np.float64)
    colors = dict(zip(characteristic(table), CHARACTERISTIC, strict=False))
    return [
        PointScales(
            column,
            name,
            float(scales[:, column].min()),
            float(scales[:, column].max()),
            colors.get(column),
            _spark(scales[:, column]),
        )
        for column, name in enumerate(table.points)
    ]


def characteristic(table: ScaleTable) -> tuple[int, ...]:
    """Columns that change most, as the median, and least; fewer where there are fewer."""
    scales = table.scales[_drawn_rows(table)]
    order = np.argsort(scales.max(0) / scales.min(0), kind="stable")[::-1]
    return tuple(dict.fromkeys(int(order[place]) for place in (0, len(order) // 2, len(order) - 1)))


def _drawn_rows(table: ScaleTable) -> NDArray[np.int64]:
    """Trained rows, not too many, the noisiest first."""
    rows = np.sort(np.asarray(table.trained, dtype=np.int64))[::-1]
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), _MAX_ROWS)).round().astype(np.int64)]


def _heat(rows: NDArray[np.int64], ratios: NDArray[np.float64]) -> str:
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    reach = max(float(np.abs(ratios).max()), 1e-3)
    stops = (0, to_rgba(FIRST)), (0.5, to_rgba(FIRST, 0)), (0.5, to_rgba(SECOND, 0)), (1, to_rgba(SECOND))
    ramp = LinearSegmentedColormap.from_list("scales", stops)  # what does not change shows the page itself

    def draw(axes: Any) -> None:  # noqa: ANN401 - matplotlib's Axes, which is imported late
        picture = axes.imshow(ratios.T, aspect="auto", cmap=ramp, vmin=-reach, vmax=reach, interpolation="none")
        picture.set_gid(HEAT)
        ticks = np.linspace(0, len(rows) - 1, min(5, len(rows))).round().astype(int)
        axes.set_xticks(ticks, [str(rows[tick]) for tick in ticks])
        axes.set(xlabel="timestep, from noise to picture", ylabel="act point, in module order")
        bar = axes.figure.colorbar(picture, label="log2(scale / centre)")
        bar.ax.patch.set_visible(False)

    return svg("scales", draw, height=3.6)


def _lines(
    rows: NDArray[np.int64], ratios: NDArray[np.float64], chosen: Sequence[int], span: tuple[float, float]
) -> str:
    colors = dict(zip(chosen, CHARACTERISTIC, strict=False))

    def draw(axes: Any) -> None:  # noqa: ANN401 - as above
        for column in range(ratios.shape[1]):
            look: dict[str, Any] = {"color": "#808080", "linewidth": 0.7, "alpha": 0.3, "zorder": 2}
            if column in colors:
                look = {"color": colors[column], "linewidth": 1.8, "zorder": 3}
            (line,) = axes.plot(rows, ratios[:, column], **look)
            line.set_gid(f"{LINE}{column}")
        axes.set(xlabel="timestep, from noise to picture", ylabel="log2(scale / centre)", xlim=span)

    return svg("lines", draw, height=3.6)


def _spark(values: NDArray[np.float64]) -> str:
    """The points of a polyline within 72 by 18; it starts at the noise."""
    low, high = float(values.min()), float(values.max())
    x = np.linspace(1, _SPARK_WIDTH - 1, len(values))
    y = np.full(len(values), _SPARK_HEIGHT / 2)
    if high > low:
        y = 1 + (_SPARK_HEIGHT - 2) * (high - values) / (high - low)
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
