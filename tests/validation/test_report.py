from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2p_deploy.pipeline import Schedule
from s2p_deploy.records import ExportedGraph, Prompt, PromptSet, SitePrecision
from s2p_deploy.validation import Chain, figures
from s2p_deploy.validation.gates import judge, verdict_of
from s2p_deploy.validation.measurements import BlockAgreement, EndToEnd, Measurements, PointCodes
from s2p_deploy.validation.numbers import Skipped
from s2p_deploy.validation.pictures import Drawing, compare_drawings
from s2p_deploy.validation.report import Drawings, render_html, write_pictures
from s2p_deploy.validation.summary import plain, summary

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\" ' & {{ 7 * 7 }}"
PROMPTS = PromptSet((Prompt("bad", HOSTILE), Prompt("good", "a cat")))
SITES = (SitePrecision("mid_block.resnets.0.conv1", "conv", "rescale", 8, 8, "int8"),)


def drawing(seed: int) -> Drawing:
    rng = np.random.default_rng(seed)
    pictures = rng.random((2, 32, 32, 3)).astype(np.float32)
    return Drawing(pictures, rng.standard_normal((3, 2, 4, 8, 8)).astype(np.float32), (901.0, 501.0, 1.0), 1.5)


DRAWINGS = Drawings(PROMPTS, drawing(0), drawing(1))


def measurements() -> Measurements:
    level = np.linspace(30, 40, 8)
    blocks = (BlockAgreement("conv_in", 90.0, 8), BlockAgreement("mid_block.resnets.0", 60.0, 8))
    compared = compare_drawings(DRAWINGS.reference, DRAWINGS.candidate, PROMPTS, Schedule(3), 2.5)
    return Measurements(
        quantized=True,
        graph_half=False,
        engine_half=False,
        points=(PointCodes("mid_block.resnets.0.conv1", 1.25e-5, 1, 800_000),),
        graph_blocks=blocks,
        engine_blocks=blocks,
        end_to_end=EndToEnd(np.arange(8) * 100, level, level - 0.1, level, level, 0.05),
        pictures=compared,
        other_schedules=(replace(compared, schedule=Schedule(20, "ddim")),),
    )


def data_of(found: Measurements, chain: Chain) -> dict[str, Any]:
    gates = judge(found, chain.recipe.validation.gates)
    return summary(found) | plain(
        {
            "gates": gates,
            "verdict": verdict_of(gates),
            "recipe": {"name": HOSTILE, "block_sqnr": 50.0},
            "base": {"source": HOSTILE},
            "engine": {"backend": "onnxruntime", "hint": HOSTILE, "environment": {"device": HOSTILE}},
            "sizes": {"engine": 1_000_000, "base_denoiser": 4_000_000},
            "digests": {"engine": "0" * 64},
            "versions": {"torch": "2"},
            "command": HOSTILE,
        }
    )


def page(chain: Chain, **changes: object) -> str:
    found = replace(measurements(), **changes)
    drawings = None if isinstance(found.pictures, Skipped) else DRAWINGS
    return render_html(data_of(found, chain), found, chain.graph, SITES, drawings)


class Elements(HTMLParser):
    """Every tag with its attributes, and whether open and closed tags balance."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def elements(html: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(html)
    assert not parser.open
    return parser.found


def test_hostile_text_stays_text(chain: Chain) -> None:
    html = page(chain)
    found = elements(html)
    assert "script" not in {tag for tag, _ in found}
    assert not [attributes for _, attributes in found if any(name.startswith("on") for name in attributes)]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "{{ 7 * 7 }}" in html


def test_the_page_needs_no_network(chain: Chain) -> None:
    html = page(chain)
    for tag, attributes in elements(html):
        assert tag not in {"link", "iframe", "object", "base"}
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "data:").startswith(("data:image/", "data:", "#"))
    assert not re.search(r"url\((?!#)|@import", html)


def test_the_page_shows_verdict_pictures_gates_and_digests(chain: Chain) -> None:
    html = page(chain)
    found = elements(html)
    assert html.index('class="badge failed"') < html.index("<h2>")  # random pictures fail; the verdict comes first
    assert len([1 for tag, _ in found if tag == "img"]) == 3 * 2
    assert len([1 for tag, _ in found if tag == "svg"]) == 5
    for text in ("codes that differ, worst act point", "800,000", "0" * 64, "1.25e-05", "ddim", "n = 2"):
        assert text in html


def test_a_page_without_pictures_says_why(chain: Chain) -> None:
    gone = Skipped("tensorrt_rtx cannot execute here: it needs a GPU")
    html = page(chain, pictures=gone, end_to_end=gone, engine_blocks=gone)
    assert "not verified" in html
    assert gone.reason in html
    assert "img" not in {tag for tag, _ in elements(html)}


def test_every_combination_of_light_and_dark_has_its_colours(chain: Chain) -> None:
    html = page(chain)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    assert "currentColor" in html
    assert figures._INK not in html


def test_figures_are_the_same_every_time_and_differ_in_their_ids(chain: Chain) -> None:
    found = measurements()
    assert not isinstance(found.pictures, Skipped)
    first, second = figures.psnr_figure(found.pictures), figures.trajectory_figure(found.pictures)
    assert first == figures.psnr_figure(found.pictures)
    ids = [set(re.findall(r'<clipPath id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_scales_are_drawn_over_the_trained_rows(chain: Chain) -> None:
    graph: ExportedGraph = chain.graph
    svg = figures.scales_figure(graph.scales)
    assert svg.startswith("<svg")
    for row in (graph.scales.trained[0], graph.scales.trained[-1]):
        assert f">{row}</text>" in svg


def test_pictures_are_written_in_pairs(tmp_path: Path) -> None:
    from PIL import Image

    write_pictures(DRAWINGS, tmp_path / "pictures")
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["000-engine.png", "000-fp.png", "001-engine.png", "001-fp.png"]
    stored = np.asarray(Image.open(tmp_path / "pictures" / "001-fp.png"))
    np.testing.assert_array_equal(stored, (DRAWINGS.reference.pictures[1] * 255).round().astype(np.uint8))


def test_json_holds_no_nan_and_no_infinity() -> None:
    assert plain({"a": float("nan"), "b": np.array([1.0, np.inf]), "c": Skipped("why")}) == {
        "a": None,
        "b": [1.0, None],
        "c": {"skipped": "why"},
    }


@pytest.mark.slow
def test_a_browser_shows_the_page_within_its_width(chain: Chain, browser: str, tmp_path: Path) -> None:
    """Headless Chromium on a phone's width: nothing may stick out of the page."""
    file = tmp_path / "report.html"
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    html = page(chain).replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    file.write_text(html.replace("</body>", probe), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom", str(file)]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    needed, width = re.findall(r"<title>(\d+) of (\d+)</title>", dom)[0]
    assert int(needed) <= int(width)
