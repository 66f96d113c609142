"""The report in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from s2p_deploy.validation import Chain
from s2p_deploy.validation.report_page import script_hash
from tests.browser import foreign, watched_page
from tests.report_pages import HOSTILE, hostile_graph, page_of

pytestmark = pytest.mark.slow

COUNT = 14
ORDER = "[...document.querySelectorAll('.pair')].map(card => Number(card.dataset.psnr))"
LAYERS = "[...document.querySelectorAll('.sortable tbody tr')].map(row => row.cells[7].dataset.value)"
HEADER = "document.querySelectorAll('.sortable thead th')[7]"


@pytest.fixture(scope="module")
def file(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page_of(chain, hostile_graph(chain.graph), COUNT), encoding="utf-8")
    return file


@pytest.fixture
def page(browser: Browser, file: Path) -> Iterator[Page]:
    """The report, opened on a desk, with everything unfolded."""
    with watched_page(browser) as opened:
        opened.page.goto(file.as_uri())
        opened.page.evaluate("document.querySelector('details').open = true")
        yield opened.page
    assert opened.problems == []
    assert foreign(opened.requests) == []


def test_it_shows_hostile_text_and_runs_none_of_it(page: Page) -> None:
    assert "failed" in page.evaluate("document.title")
    assert page.evaluate("document.querySelector('.pair[data-index=\"0\"] figcaption').textContent").endswith(HOSTILE)
    assert page.evaluate("document.querySelectorAll('script').length") == 1
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_the_policy_stops_a_script_that_is_not_the_pages_own(browser: Browser, file: Path, tmp_path: Path) -> None:
    injected = tmp_path / "injected.html"
    html = file.read_text(encoding="utf-8")
    attack = "<script>document.title = 'run'; fetch('http://192.0.2.1/')</script><img src='http://192.0.2.1/a.png'>"
    injected.write_text(html.replace("</main>", f"{attack}</main>"), encoding="utf-8")
    with watched_page(browser) as opened:
        opened.page.goto(injected.as_uri())
        assert opened.page.title() != "run"
    assert any("Content Security Policy" in problem for problem in opened.problems)


def test_pairs_are_put_in_order_by_mouse_and_keyboard(page: Page) -> None:
    worst_first = page.evaluate(ORDER)
    assert len(worst_first) == COUNT
    assert worst_first == sorted(worst_first)
    assert page.evaluate("[...document.querySelectorAll('.pair')].filter(card => card.offsetParent).length") == 12
    page.evaluate("document.querySelector('#all-pairs').click()")
    assert page.evaluate("[...document.querySelectorAll('.pair')].filter(card => card.offsetParent).length") == COUNT
    x, y = page.evaluate(
        "(button => { button.scrollIntoView(); const box = button.getBoundingClientRect();"
        " return [box.x + box.width / 2, box.y + box.height / 2] })(document.querySelector('[data-order=best]'))"
    )
    page.mouse.click(x, y)
    assert page.evaluate(ORDER) == worst_first[::-1]
    page.evaluate("document.querySelector('[data-order=prompt]').focus()")
    page.keyboard.press("Enter")
    places = page.evaluate("[...document.querySelectorAll('.pair')].map(card => Number(card.dataset.index))")
    assert places == list(range(COUNT))
    assert page.evaluate("document.querySelector('[data-order=prompt]').getAttribute('aria-pressed')") == "true"


def test_the_table_of_layers_is_sorted_by_keyboard_and_says_so(page: Page) -> None:
    assert "sensitivity" in page.evaluate(f"{HEADER}.textContent")
    start = [float(value) for value in page.evaluate(LAYERS)]
    page.evaluate(f"{HEADER}.querySelector('button').focus()")
    page.keyboard.press("Enter")
    assert [float(value) for value in page.evaluate(LAYERS)] == sorted(start, reverse=True)
    assert page.evaluate(f"{HEADER}.getAttribute('aria-sort')") == "descending"
    page.keyboard.press("Enter")
    assert [float(value) for value in page.evaluate(LAYERS)] == sorted(start)
    assert page.evaluate(f"{HEADER}.getAttribute('aria-sort')") == "ascending"
    page.evaluate("document.querySelector('.sortable thead th button').click()")
    assert page.evaluate("document.querySelectorAll('[aria-sort]').length") == 1


def test_an_activation_quantizer_is_chosen_by_name_and_in_the_heat_map(page: Page) -> None:
    page.evaluate(
        "(box => { box.value = '2'; box.dispatchEvent(new Event('change')) })(document.querySelector('select'))"
    )
    assert page.evaluate("[...document.querySelectorAll('.chosen')].map(line => line.id)") == ["scale-line-2"]
    assert "scale " in page.evaluate("document.querySelector('#scale-note').textContent")
    x, y = page.evaluate(
        "(heat => { heat.scrollIntoView({block: 'center'}); const box = heat.getBoundingClientRect();"
        " return [box.x + box.width / 2, box.y + 1] })(document.querySelector('#scale-heat'))"
    )
    page.mouse.click(x, y)
    assert page.evaluate("[...document.querySelectorAll('.chosen')].map(line => line.id)") == ["scale-line-0"]
    page.evaluate(
        "(box => { box.value = ''; box.dispatchEvent(new Event('change')) })(document.querySelector('select'))"
    )
    assert page.evaluate("document.querySelectorAll('.chosen').length") == 0


def test_dark_is_dark_and_print_is_white(page: Page) -> None:
    def brightness() -> tuple[int, int]:
        colours = page.evaluate("['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])")
        page_colour, ink = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
        return page_colour, ink

    light = brightness()
    page.emulate_media(color_scheme="dark")
    dark = brightness()
    page.emulate_media(color_scheme="dark", media="print")
    printed = brightness()
    assert light[0] - light[1] > 300
    assert dark[1] - dark[0] > 300
    assert printed[0] == 3 * 255
    assert printed[0] - printed[1] > 300
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_sticks_out_of_a_narrow_window(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_the_script_everything_is_there_and_no_control_is(browser: Browser, file: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.html"
    html = file.read_text(encoding="utf-8").replace(f"script-src '{script_hash()}'", "script-src 'none'")
    plain.write_text(html, encoding="utf-8")
    with watched_page(browser) as opened:
        opened.page.goto(plain.as_uri())
        cards = "[...document.querySelectorAll('.pair')].filter(card => card.offsetParent).length"
        assert opened.page.evaluate(cards) == COUNT
        assert opened.page.evaluate("[...document.querySelectorAll('.scripted')].every(one => !one.offsetParent)")
        assert opened.page.evaluate("document.querySelector('.characteristic').offsetParent !== null")
