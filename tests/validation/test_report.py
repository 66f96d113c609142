from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from s2p_deploy.errors import InputError
from s2p_deploy.validation import Chain, figures
from s2p_deploy.validation.numbers import Skipped
from s2p_deploy.validation.report import render_html, script, script_hash
from s2p_deploy.validation.summary import plain
from tests.report_pages import HOSTILE, data_of, drawings_of, hostile_graph, measurements, page_of


class Elements(HTMLParser):
    """Every tag with its attributes, the text of scripts, and whether open and closed tags balance."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def parsed(html: str) -> Elements:
    parser = Elements()
    parser.feed(html)
    assert not parser.open
    return parser


def elements(html: str) -> list[tuple[str, dict[str, str | None]]]:
    return parsed(html).found


def test_hostile_text_stays_text(chain: Chain) -> None:
    html = page_of(chain, hostile_graph(chain.graph))
    found = parsed(html)
    assert found.scripts == [script()]  # constant: nothing from outside is inside it
    assert not [attributes for _, attributes in found.found if any(name.startswith("on") for name in attributes)]
    assert [attributes for tag, attributes in found.found if tag == "img" and attributes.get("src") == "x"] == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "{{ 7 * 7 }}" in html


def test_the_policy_allows_that_script_and_no_other(chain: Chain) -> None:
    html = page_of(chain)
    policy = next(a["content"] for tag, a in elements(html) if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(parsed(html).scripts[0].encode()).digest()).decode()
    assert script_hash() == f"sha256-{digest}"
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"


def test_the_page_needs_no_network(chain: Chain) -> None:
    html = page_of(chain)
    for tag, attributes in elements(html):
        assert tag not in {"link", "iframe", "object", "base"}
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "data:").startswith(("data:image/", "data:", "#"))
    assert not re.search(r"url\((?!#)|@import", html)


def test_the_page_shows_verdict_pictures_gates_and_digests(chain: Chain) -> None:
    html = page_of(chain)
    found = elements(html)
    assert html.index('class="badge failed"') < html.index("<h2")  # random pictures fail; the verdict comes first
    assert len([1 for tag, _ in found if tag == "img"]) == 3 * 2
    for text in ("codes that differ, worst act point", "800,000", "0" * 64, "1.25e-05", "ddim", "n = 2", ">17<"):
        assert text in html
    for figure in ("Teacher-forced", "Free-running", "PSNR of every picture", "fed the reference", "line of the map"):
        assert figure in html


def test_a_failed_gate_says_where_before_anything_else(chain: Chain) -> None:
    data = data_of(measurements(), chain)
    data["gates"][0] |= {"status": "failed", "where": f"some site, row 3 {HOSTILE}"}
    html = render_html(data, chain.graph, drawings_of().pairs)
    assert html.index("where: some site, row 3 &lt;script") < html.index('class="tiles"')
    assert html.count("where: some site") == 2
    elements(html)


def test_a_page_without_pictures_says_why(chain: Chain) -> None:
    gone = Skipped("tensorrt_rtx cannot execute here: it needs a GPU")
    html = page_of(chain, pictures=gone, end_to_end=gone, engine_blocks=gone)
    assert "not verified" in html
    assert gone.reason in html
    assert "img" not in {tag for tag, _ in elements(html)}


def test_metrics_that_the_page_does_not_know_are_shown_with_their_reason_or_interval(chain: Chain) -> None:
    data = data_of(measurements(), chain)
    data["pictures"]["lpips"] = {"median": {"value": 0.0125, "n": 77, "low": 0.01, "high": 0.02}}
    data["not_run"] = {"clip_score": f"no weights {HOSTILE}"}
    html = render_html(data, chain.graph, drawings_of().pairs)
    assert re.search(
        r"<td>pictures, lpips, median</td><td class=\"figure\">0.0125</td>.*0.0100 to 0.0200, n = 77", html
    )
    assert "skipped: no weights &lt;script" in html


def test_sensitivities_are_drawn_where_the_plan_has_them_and_missed_where_not(chain: Chain) -> None:
    assert "The plan holds no sensitivities" in page_of(chain)
    html = page_of(chain, hostile_graph(chain.graph))
    assert "The plan holds no sensitivities" not in html
    strip = html.split('aria-label="Sensitivity of every layer"')[1].split("</svg>")[0]
    heights = [float(height) for height in re.findall(r' height="([\d.]+)"', strip)]
    assert len(heights) == len(chain.graph.plan.sites)
    assert heights == sorted(heights)  # as the sensitivities are
    assert heights[-1] == 1.0


def test_a_benchmark_of_the_engine_is_shown_and_of_another_refused(chain: Chain) -> None:
    number = {"value": 0.0125, "n": 30, "low": 0.01, "high": 0.02}
    figures_of = {
        "digest": "0" * 64,
        "size": 1_000_000,
        "load_seconds": 0.5,
        "memory": {"before": 1, "loaded": 2_000_000, "steady": 3_000_000, "peak": 4_000_000},
        "step_p50": number,
        "step_p95": number,
        "images_per_minute": None,
        "ratios": {"step": number, "images_per_minute": None, "load": 1.5, "steady_memory": 0.7, "peak_memory": 0.8},
    }
    run = {"backend": HOSTILE, "batch": 2, "machine": {"processor": HOSTILE, "cores": 2, "gpu": None}}
    bench = run | {"baseline": figures_of | {"ratios": None}, "engines": [figures_of]}
    data = data_of(measurements(), chain)
    html = render_html(data | {"bench": bench}, chain.graph, drawings_of().pairs)
    elements(html)
    for text in ("step, p50", "12.5 ms", "0.01 (0.01 to 0.02)", "memory, peak", "4 MB", "0.80"):
        assert text in html
    data["digests"]["engine"] = "1" * 64
    with pytest.raises(InputError, match="1111"):
        render_html(data | {"bench": bench}, chain.graph, drawings_of().pairs)


def test_json_holds_no_nan_and_no_infinity() -> None:
    assert plain({"a": float("nan"), "b": np.array([1.0, np.inf]), "c": Skipped("why")}) == {
        "a": None,
        "b": [1.0, None],
        "c": {"skipped": "why"},
    }


def test_every_combination_of_light_and_dark_has_its_colours(chain: Chain) -> None:
    html = page_of(chain)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert 'name="viewport"' in html
    assert "currentColor" in html
    assert figures._INK not in html


def test_figures_are_the_same_every_time_and_differ_in_their_ids() -> None:
    error = {"timestep": [901.0, 1.0], "p10": [0.1, 0.1], "median": [0.2, None], "p90": [0.3, 0.3]}
    first = figures.psnr_figure([30.0, None, 20.0], 10.0)
    second = figures.trajectory_figure({"own": error}, (1000, 0))
    assert first == figures.psnr_figure([30.0, None, 20.0], 10.0)
    ids = [set(re.findall(r'<clipPath id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
