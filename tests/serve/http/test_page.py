"""The page at ``/`` in a real browser."""

from __future__ import annotations

import base64
import io
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from s2p_deploy.serve.http.metrics import Metrics
from tests.browser import WatchedPage, foreign, wait_until, watched_page
from tests.serve.http.live_server import MANY_STEPS, PROMPT, STEPS, LiveServer, live_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

    from tests.serve.http.conftest import Opening

pytestmark = pytest.mark.slow

READY = "document.querySelector('#draw')?.disabled === false"
COMPARED = f"document.querySelector('#comparison')?.hidden === false && {READY}"
TOLD = "document.querySelector('#problem').hidden === false"
PICTURES = "[...document.querySelectorAll('#pictures img')].map(image => image.src.split(',')[1])"
PAINTED = "document.querySelector('#difference').toDataURL().split(',')[1]"


@contextmanager
def opened_page(browser: Browser, server: LiveServer) -> Iterator[WatchedPage]:
    """The server's page; nothing may be requested from another server."""
    with watched_page(browser) as opened:
        opened.page.goto(f"{server.url}/")
        yield opened
    assert foreign(opened.requests, f"{server.url}/") == []


@pytest.fixture
def page(browser: Browser, server: LiveServer) -> Iterator[Page]:
    """The page, ready to draw; nothing may be said on the console."""
    with opened_page(browser, server) as opened:
        wait_until(opened.page, READY)
        fill(opened.page, prompt=PROMPT, seed=7, steps=STEPS)
        yield opened.page
    assert opened.problems == []


def fill(page: Page, **values: object) -> None:
    for name, value in values.items():
        page.evaluate(f"document.getElementById('{name}').value = {str(value)!r}")


def press(page: Page, name: str) -> None:
    page.evaluate(f"document.getElementById('{name}').click()")


def pixels_of(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(np.int64)


def test_it_draws_both_engines_and_their_difference(page: Page, server: LiveServer) -> None:
    press(page, "draw")
    wait_until(page, COMPARED)
    one, other = map(pixels_of, page.evaluate(PICTURES))
    drawn = pixels_of(server.draw().data["data"][0]["b64_json"])
    assert np.abs(one - drawn).max() <= 1
    psnr = 10 * np.log10(255**2 / np.mean((one - other) ** 2))
    assert page.evaluate("document.querySelector('#psnr').textContent") == f"PSNR {psnr:.1f} dB"
    assert np.array_equal(pixels_of(page.evaluate(PAINTED)), np.minimum(255, 8 * np.abs(one - other)))
    page.evaluate("(s => { s.value = '3'; s.dispatchEvent(new Event('input')) })(document.querySelector('#amplify'))")
    assert np.array_equal(pixels_of(page.evaluate(PAINTED)), np.minimum(255, 3 * np.abs(one - other)))
    assert page.evaluate("[...document.querySelectorAll('progress')].every(bar => bar.position === 1)")


def test_it_draws_one_engine_alone(page: Page) -> None:
    fill(page, model="fp")
    press(page, "draw")
    wait_until(page, f"document.querySelector('#pictures img')?.hidden === false && {READY}")
    assert len(page.evaluate(PICTURES)) == 1
    assert page.evaluate("document.querySelector('#comparison').hidden")
    assert page.evaluate("document.querySelector('#pictures img').alt").startswith(PROMPT)


def test_it_shows_how_far_it_is_and_stops(page: Page, server: LiveServer) -> None:
    fill(page, steps=MANY_STEPS)
    press(page, "draw")
    wait_until(page, "document.querySelector('progress')?.value > 0")
    assert page.evaluate("document.querySelector('progress').position") < 1
    assert f"of {MANY_STEPS + 1} steps" in page.evaluate("document.querySelector('.said').textContent")
    press(page, "stop")
    wait_until(page, READY)
    server.wait_for(lambda: server.metric("s2p_active_requests", model="small") == 0, 2)
    assert page.evaluate("document.querySelector('#problem').hidden")


def test_every_control_has_a_label_and_a_narrow_window_holds_all(page: Page) -> None:
    controls = "[...document.querySelectorAll('main input, main select, main textarea')]"
    assert page.evaluate(f"{controls}.every(control => control.labels.length === 1)")
    press(page, "draw")
    wait_until(page, COMPARED)
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_dark_is_dark(page: Page) -> None:
    def brightness() -> int:
        found = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, found[4:-1].split(",")))

    light = brightness()
    page.emulate_media(color_scheme="dark")
    assert light - brightness() > 400


def test_a_refusal_is_told_in_words(browser: Browser, server: LiveServer) -> None:
    with opened_page(browser, server) as opened:
        page = opened.page
        wait_until(page, READY)
        page.evaluate("document.querySelector('#steps').removeAttribute('max')")
        fill(page, steps=100_000)
        press(page, "draw")
        wait_until(page, TOLD)
        assert "1 to 900 are allowed" in page.evaluate("document.querySelector('#problem').textContent")


def test_it_asks_for_the_token_and_draws_with_it(browser: Browser, opening: Opening) -> None:
    metrics, token = Metrics(), "a-token-of-some-length"
    openings = {"small": opening("small", metrics)}
    with live_server(openings, metrics=metrics, token=token) as server, opened_page(browser, server) as opened:
        page = opened.page
        wait_until(page, "document.querySelector('#token-field')?.hidden === false")
        fill(page, token=token)
        page.evaluate("document.querySelector('#token').dispatchEvent(new Event('change'))")
        wait_until(page, READY)
        fill(page, steps=STEPS)
        press(page, "draw")
        wait_until(page, f"document.querySelector('#pictures img')?.hidden === false && {READY}")
