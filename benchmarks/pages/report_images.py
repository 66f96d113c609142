"""Pictures of a validation report for the documentation: light, dark, and on a phone.

    python -m benchmarks.pages.report_images build/demo/w4a8/report-openvino

Needs Chromium; writes ``docs/images/report-{light,dark,narrow}.png``.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from tests.browser import installed_browser, started_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FloatRect

_GAP, _BETWEEN = 12, (128, 128, 128)


@dataclass(frozen=True)
class Shot:
    """One picture: the window's width, the scheme, and its parts: where from, and height, in pixels.

    The parts lie side by side, or one below the other (``down``).
    """

    name: str
    width: int
    dark: bool
    parts: tuple[tuple[str, int], ...]
    down: bool = False


SHOTS = (
    Shot("light", 1100, dark=False, parts=(("header", 700), ("#pictures", 580)), down=True),
    Shot("dark", 1100, dark=True, parts=(("#timesteps", 1420),)),
    Shot("narrow", 360, dark=False, parts=(("header", 840), ("#pictures", 840), ("#scales", 840))),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="folder of a ValidationReport")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    program = installed_browser()
    if program is None:
        parser.error("no Chromium here")
    with started_browser(program) as browser:
        for shot in SHOTS:
            file = options.out / f"report-{shot.name}.png"
            save(taken(browser, options.report / "report.html", shot), file, down=shot.down)
            print(f"{file}: {file.stat().st_size} bytes")


def taken(browser: Browser, report: Path, shot: Shot) -> list[Image.Image]:
    """The parts of a picture."""
    scheme: Literal["dark", "light"] = "dark" if shot.dark else "light"
    page = browser.new_page(viewport={"width": shot.width, "height": 900}, color_scheme=scheme)
    page.goto(report.resolve().as_uri())
    parts = []
    for selector, height in shot.parts:
        top = page.evaluate(f"document.querySelector('{selector}').getBoundingClientRect().top + scrollY - 16")
        clip: FloatRect = {"x": 0, "y": max(top, 0), "width": shot.width, "height": height}
        parts.append(Image.open(io.BytesIO(page.screenshot(clip=clip, full_page=True))).convert("RGB"))
    page.close()
    return parts


def save(parts: list[Image.Image], file: Path, *, down: bool) -> None:
    """Parts of one size across the way that they are put together, with a bar between them."""
    steps = [(0, part.height + _GAP) if down else (part.width + _GAP, 0) for part in parts]
    width, height = (sum(sizes) for sizes in zip(*steps, strict=True))
    size = (parts[0].width, height - _GAP) if down else (width - _GAP, parts[0].height)
    whole = Image.new("RGB", size, _BETWEEN)
    x = y = 0
    for part, (right, below) in zip(parts, steps, strict=True):
        whole.paste(part, (x, y))
        x, y = x + right, y + below
    file.parent.mkdir(parents=True, exist_ok=True)
    whole.save(file, optimize=True)


if __name__ == "__main__":
    main()
