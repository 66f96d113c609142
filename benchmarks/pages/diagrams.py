"""Draws the diagrams of docs/ as SVG: ``python -m benchmarks.pages.diagrams``.

Colors are fixed on a light card, so that the pictures read the same on light and dark pages.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
INK, LINE, STAGE, ARTIFACT, USE = "#1f2937", "#64748b", "#c7d2fe", "#f1f5f9", "#bbf7d0"

# Artifact, what it holds, and the stage that makes the next one of it.
CHAIN = (
    ("diffusers pipeline", "floating point", "calibrate"),
    ("CalibratedModel", "weights, a scale per\nquantizer and timestep", "export"),
    ("ExportedGraph", "one QDQ ONNX graph,\nscales as an input", "build"),
    ("Engine", "what a backend\nmade of the graph", None),
)
USES = (("validate", "report, verdict"), ("generate", "pictures"), ("serve", "HTTP, Triton, Ray"))
LAYERS = (
    ("what users run", ("cli", "serve", "bench", "validation")),
    ("the engine in diffusers", ("pipeline",)),
    ("stages", ("engines", "export", "calib")),
    ("models", ("shapes", "families")),
    ("settings", ("recipe", "schedulers", "timesteps")),
    ("nouns and numbers", ("signing", "records", "numerics")),
    ("base", ("context", "errors")),
)


def main() -> None:
    for name, text in {"data-flow": data_flow(), "layers": layers()}.items():
        (IMAGES / f"{name}.svg").write_text(text, encoding="utf-8")


def data_flow() -> str:
    """Stages as arrows between artifacts, and what is done with an engine."""
    width, height, gap, top = 164, 84, 96, 48
    shapes = []
    for number, (name, about, stage) in enumerate(CHAIN):
        x = 20 + number * (width + gap)
        shapes.append(box((x, top), (width, height), name, about, ARTIFACT))
        if stage:
            shapes.append(arrow(x + width, top + height / 2, x + width + gap, top + height / 2))
            shapes.append(label(x + width + gap / 2, top + height / 2 - 12, stage))
    engine = 20 + 3 * (width + gap)
    for number, (name, about) in enumerate(USES):
        x = engine - 2 * (width + 16) + number * (width + 16)
        shapes.append(box((x, 214), (width, 64), name, about, USE))
        shapes.append(arrow(engine + width / 2, top + height, x + width / 2, 214))
    prompts = 20 + width + gap / 2
    shapes.append(label(prompts, top - 22, "prompts", bold=False))
    shapes.append(arrow(prompts, top - 16, prompts, top + height / 2 - 26))
    return svg(engine + width + 20, 298, shapes)


def layers() -> str:
    """Packages from what users run down to what everything uses."""
    row, shapes = 58, []
    for number, (about, names) in enumerate(LAYERS):
        y = 20 + number * row
        shapes.append(f'<text x="20" y="{y + 26}" font-size="13" fill="{LINE}">{escape(about)}</text>')
        width = (520 - 10 * (len(names) - 1)) / len(names)
        for place, name in enumerate(names):
            fill = STAGE if name in {"calib", "export", "engines"} else ARTIFACT
            shapes.append(box((200 + place * (width + 10), y), (width, 42), name, "", fill))
        if number:
            shapes.append(arrow(460, y - row + 42, 460, y))
    return svg(740, 20 + len(LAYERS) * row, shapes)


def box(place: tuple[float, float], size: tuple[float, float], title: str, about: str, fill: str) -> str:
    """A rounded box with a title and lines below it."""
    (x, y), (width, height) = place, size
    lines = about.split("\n") if about else []
    first = y + height / 2 + 5 - 9 * len(lines)
    center = x + width / 2
    parts = [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{fill}" stroke="{LINE}"/>',
        label(center, first, title),
    ]
    parts += [label(center, first + 19 + 16 * number, line, bold=False) for number, line in enumerate(lines)]
    return "\n".join(parts)


def label(x: float, y: float, text: str, *, bold: bool = True) -> str:
    """Centered text."""
    style = 'font-size="15" font-weight="600"' if bold else 'font-size="12.5"'
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" {style} fill="{INK}">{escape(text)}</text>'


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """A line with a head at its end."""
    return (
        f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{LINE}" stroke-width="1.6"'
        ' marker-end="url(#head)"/>'
    )


def svg(width: float, height: float, shapes: list[str]) -> str:
    """A whole file."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
        f' height="{height:g}" font-family="system-ui, sans-serif">\n'
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 10 5 0 10z" fill="{LINE}"/></marker></defs>\n'
        f'<rect width="{width:g}" height="{height:g}" rx="12" fill="#ffffff"/>\n'
    )
    return head + "\n".join(shapes) + "\n</svg>\n"


if __name__ == "__main__":
    main()
