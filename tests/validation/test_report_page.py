from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s2p_deploy.errors import InputError
from s2p_deploy.records import ActivationQuantizer, LayerPlan, LayerPrecision, Number, PrecisionPlan, Skipped
from s2p_deploy.validation import Chain, figures
from s2p_deploy.validation.measurements import LayerAgreement, Measurements, PictureComparison, QuantizerCodes
from s2p_deploy.validation.pictures import PicturePairs
from s2p_deploy.validation.report import PictureNumbers, StepErrors
from s2p_deploy.validation.report_page import (
    AMPLIFICATION,
    MOST_PAIRS,
    Group,
    Layer,
    Row,
    difference,
    groups_of,
    layers_of,
    number_rows,
    render_html,
    script,
    script_hash,
    shown_pairs,
    thumbnail,
)
from tests.report_pages import HOSTILE, data_of, generated, hostile_graph, measurements, page_of


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
    for text in (
        "codes that differ, worst activation quantizer",
        "800,000",
        "0" * 64,
        "1.25e-05",
        "ddim",
        "n = 2",
        ">17<",
    ):
        assert text in html
    for figure in ("Teacher-forced", "Free-running", "PSNR of every picture", "fed the reference", "line of the map"):
        assert figure in html


def test_a_failed_gate_says_where_before_anything_else(chain: Chain) -> None:
    data = data_of(measurements(), chain)
    failed = replace(data.gates[0], status="failed", where=f"some layer, timestep 3 {HOSTILE}")
    data = data.model_copy(update={"gates": (failed, *data.gates[1:])})
    html = render_html(data, chain.graph, generated().pairs)
    assert html.index("where: some layer, timestep 3 &lt;script") < html.index('class="tiles"')
    assert html.count("where: some layer") == 2
    elements(html)


def test_a_page_without_pictures_says_why(chain: Chain) -> None:
    gone = Skipped("tensorrt_rtx cannot execute here: it needs a GPU")
    html = page_of(chain, pictures=gone, end_to_end=gone, engine_blocks=gone)
    assert "not verified" in html
    assert gone.reason in html
    assert "img" not in {tag for tag, _ in elements(html)}


def test_metrics_that_the_page_does_not_know_are_shown_with_their_reason_or_interval(chain: Chain) -> None:
    data = data_of(measurements(), chain)
    perceptual = {"lpips": {"median": Number(0.0125, 77, 0.01, 0.02)}}
    assert isinstance(data.pictures, PictureNumbers)
    pictures = data.pictures.model_copy(update={"perceptual": perceptual})
    data = data.model_copy(update={"pictures": pictures, "not_run": {"clip_score": f"no weights {HOSTILE}"}})
    html = render_html(data, chain.graph, generated().pairs)
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
    assert len(heights) == len(chain.graph.plan.layers)
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
        "gates": [
            {"name": "speedup", "limit": 1.2, "value": 0.9, "passed": False},
            {"name": "int8_share", "limit": 0.5, "value": None, "passed": False},
        ],
    }
    run = {"backend": HOSTILE, "batch": 2, "machine": {"processor": HOSTILE, "cores": 2, "gpu": None}}
    bench = run | {"baseline": figures_of | {"ratios": None}, "engines": [figures_of]}
    data = data_of(measurements(), chain)
    html = render_html(data.model_copy(update={"bench": bench}), chain.graph, generated().pairs)
    elements(html)
    for text in ("step, p50", "12.5 ms", "0.01 (0.01 to 0.02)", "memory, peak", "4 MB", "0.80", "no gain here"):
        assert text in html
    other = data.model_copy(update={"bench": bench, "digests": {"engine": "1" * 64}})
    with pytest.raises(InputError, match="1111"):
        render_html(other, chain.graph, generated().pairs)


def test_json_holds_no_nan_and_no_infinity(chain: Chain) -> None:
    found = measurements()
    assert isinstance(found.pictures, PictureComparison)
    broken = replace(found.pictures, similarity=replace(found.pictures.similarity, psnr=np.array([np.nan, np.inf])))
    data = data_of(replace(found, pictures=broken, end_to_end=Skipped("why")), chain)
    text = json.loads(data.model_dump_json(), parse_constant=pytest.fail)
    assert text["pictures"]["values"]["psnr"] == [None, None]
    assert text["engine_numbers"]["end_to_end"] == {"skipped": "why"}
    assert "not a number" in render_html(data, chain.graph, generated().pairs)


def test_every_combination_of_light_and_dark_has_its_colours(chain: Chain) -> None:
    html = page_of(chain)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert 'name="viewport"' in html
    assert "currentColor" in html
    assert figures._INK not in html


def test_figures_are_the_same_every_time_and_differ_in_their_ids() -> None:
    error = StepErrors(timestep=(901.0, 1.0), p10=(0.1, 0.1), median=(0.2, np.nan), p90=(0.3, 0.3))
    first = figures.psnr_figure([30.0, np.nan, 20.0], 10.0)
    second = figures.trajectory_figure({"own": error}, (1000, 0))
    assert first == figures.psnr_figure([30.0, np.nan, 20.0], 10.0)
    ids = [set(re.findall(r'<clipPath id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]


LAYERS = (
    LayerPlan("conv_in", "conv", "int8", None, "rule 1"),
    LayerPlan("down_blocks.0.attn.to_q", "linear", "int4", "down_blocks.0.attn.to_q", "rule 2"),
    LayerPlan("down_blocks.0.attn.to_k", "linear", "int4", "down_blocks.0.attn.to_q", "rule 2"),
    LayerPlan("mid_block.conv", "conv", "none", None, "rule 3"),
)
POINT = ActivationQuantizer("down_blocks.0.attn.to_q", "int8", ("down_blocks.0.attn.to_q", "down_blocks.0.attn.to_k"))


def layers(chain: Chain, *sensitivities: float | None, found: Measurements | None = None) -> list[Layer]:
    planned = tuple(
        replace(layer, sensitivity=value) for layer, value in zip(LAYERS, sensitivities or [None] * 4, strict=True)
    )
    measured = replace(
        found or measurements(),
        quantizers=(QuantizerCodes(POINT.name, 0.25, 1, 4),),
        engine_layers=(LayerAgreement("conv_in", 61.5, 40.0, 8),),
    )
    engine = data_of(measured, chain).engine
    known = engine.model_copy(update={"layers": (LayerPrecision("conv_in", "conv", "rescale", 8, 16, "int8"),)})
    data = data_of(found or measured, chain, engine=known)
    return layers_of(data, PrecisionPlan(planned, (POINT,)), ())


def test_a_layer_gathers_what_is_known_of_its_layer_and_its_activation_quantizer(chain: Chain) -> None:
    first, query, key, last = layers(chain)
    assert (first.stored_bits, first.compute, first.sqnr, first.activations) == (8, "int8", 61.5, "none")
    assert (query.mismatch, query.max_lsb, query.activations) == (0.25, 1, "int8")
    assert key.mismatch == 0.25  # layers that read one tensor share its codes
    assert (last.stored_bits, last.compute, last.sqnr, last.mismatch) == (None, "", None, None)


def test_what_was_not_measured_is_none(chain: Chain) -> None:
    gone = Skipped("it needs a GPU")
    found = layers(chain, found=replace(measurements(), quantizers=gone, engine_layers=gone))
    assert {(layer.mismatch, layer.sqnr) for layer in found} == {(None, None)}


def test_bars_are_logarithmic_from_the_least_to_the_most_sensitive(chain: Chain) -> None:
    bars = [layer.bar for layer in layers(chain, 1e-4, 1e-2, None, 1.0)]
    assert bars == [pytest.approx(0.04), pytest.approx(0.52), None, pytest.approx(1.0)]
    assert [layer.bar for layer in layers(chain, 0.0, 0.0, 0.0, 0.0)] == [0.04] * 4
    assert [layer.bar for layer in layers(chain, 0.0, 1.0, 1.0, 1.0)] == [0.04] * 4  # none stands out above another
    assert {layer.bar for layer in layers(chain)} == {None}


def test_neighbours_of_one_part_are_a_group(chain: Chain) -> None:
    assert groups_of(layers(chain)) == [Group("conv_in", 1), Group("down_blocks.0", 2), Group("mid_block", 1)]


def test_numbers_are_found_wherever_they_are() -> None:
    found = {
        "n": 64,
        "lpips": {"median": {"value": 0.1, "low": 0.05, "high": 0.2, "n": 64}},
        "fid_clip": {"skipped": "no weights"},
        "ratio": 0.5,
        "values": {"psnr": [1.0, 2.0]},
        "fine": True,
        "text": "words",
        "broken": {"value": None, "low": None, "high": None, "n": 3},
    }
    assert list(number_rows(found, prefix="pictures")) == [
        Row("pictures, lpips, median", 0.1, 0.05, 0.2, 64),
        Row("pictures, fid clip", None, skipped="no weights"),
        Row("pictures, ratio", 0.5),
        Row("pictures, broken", None, n=3),
    ]


@pytest.mark.parametrize("found", [{}, {"a": {}}, {"a": [1.0]}, {"psnr": {"value": 1.0, "n": 1}}])
def test_what_is_left_out_or_no_number_is_no_row(found: dict[str, object]) -> None:
    assert list(number_rows(found, ("psnr",))) == []


def pairs(count: int, side: int = 8) -> PicturePairs:
    rng = np.random.default_rng(0)
    reference, candidate = rng.integers(0, 256, (2, count, side, side, 3), dtype=np.uint8)
    return PicturePairs(tuple(f"prompt {index}" for index in range(count)), reference, candidate)


def opened(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))


def test_pictures_are_written_in_pairs_and_read_back(tmp_path: Path) -> None:
    given = pairs(2)
    given.write(tmp_path / "pictures")
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["000-engine.png", "000-fp.png", "001-engine.png", "001-fp.png"]
    read = PicturePairs.read(tmp_path / "pictures", given.texts)
    np.testing.assert_array_equal(read.reference, given.reference)
    np.testing.assert_array_equal(read.candidate, given.candidate)


def test_pairs_come_worst_first_with_their_place_among_the_prompts() -> None:
    shown = shown_pairs(pairs(4), [30.0, 20.0, np.nan, 40.0])
    assert [pair["index"] for pair in shown] == [2, 1, 0, 3]  # what is not a number is worst
    assert shown[1]["text"] == "prompt 1"
    np.testing.assert_array_equal(np.asarray(opened(shown[1]["reference"])), pairs(4).reference[1])


def test_of_many_pairs_the_worst_the_best_and_some_between_are_shown() -> None:
    psnr = [float(value) for value in np.random.default_rng(1).permutation(3 * MOST_PAIRS)]
    shown = [pair["psnr"] for pair in shown_pairs(pairs(3 * MOST_PAIRS), psnr)]
    assert len(set(shown)) == MOST_PAIRS
    assert shown == sorted(shown)
    assert (shown[0], shown[-1]) == (0.0, 3 * MOST_PAIRS - 1)


def test_the_difference_is_absolute_amplified_and_cut() -> None:
    black = np.zeros((1, 2, 3), np.uint8)
    other = np.array([[[1, 2, 3], [100, 0, 15]]], np.uint8)
    expected = [[[AMPLIFICATION, 2 * AMPLIFICATION, 3 * AMPLIFICATION], [255, 0, 15 * AMPLIFICATION]]]
    assert difference(black, other).tolist() == expected
    assert difference(other, black).tolist() == expected


@pytest.mark.parametrize(("side", "form", "shown"), [(64, "PNG", 64), (512, "JPEG", 192)])
def test_large_pictures_are_shown_smaller(side: int, form: str, shown: int) -> None:
    picture = opened(thumbnail(pairs(1, side).reference[0]))
    assert (picture.format, picture.size) == (form, (shown, shown))
