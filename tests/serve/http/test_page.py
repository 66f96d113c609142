"""The page at ``/`` in a real browser: headless Chromium, skipped where there is none."""

from __future__ import annotations

import base64
import io
import shutil
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from s2p_deploy.serve.http.metrics import Metrics
from tests.chromium import Chromium
from tests.serve.http.live_server import MANY_STEPS, PROMPT, STEPS, LiveServer, live_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.serve.http.conftest import Opening

pytestmark = pytest.mark.slow

READY = "document.querySelector('#draw')?.disabled === false"
COMPARED = f"document.querySelector('#comparison')?.hidden === false && {READY}"
TOLD = "document.querySelector('#problem').hidden === false"
PICTURES = "[...document.querySelectorAll('#pictures img')].map(image => image.src.split(',')[1])"
PAINTED = "document.querySelector('#difference').toDataURL().split(',')[1]"


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or pytest.skip("no Chromium here")


@contextmanager
def opened_page(browser: str, server: LiveServer) -> Iterator[Chromium]:
    with Chromium(browser) as page:
        page.look(1200)
        page.evaluate(f"location.assign('{server.url}/')")
        yield page


@pytest.fixture
def page(browser: str, server: LiveServer) -> Iterator[Chromium]:
    """The page, ready to draw; nothing may be said on the console, nor asked of another server."""
    with opened_page(browser, server) as opened:
        wait_for(opened, READY)
        fill(opened, prompt=PROMPT, seed=7, steps=STEPS)
        yield opened
        opened.settle()
        assert opened.problems == []
        assert [url for url in opened.requests if not url.startswith(f"{server.url}/")] == []


def wait_for(page: Chromium, expression: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if page.evaluate(expression):
                return
        except RuntimeError:  # asked between two documents
            pass
        time.sleep(0.05)
    raise AssertionError(f"it did not come about: {expression}")


def fill(page: Chromium, **values: object) -> None:
    for name, value in values.items():
        page.evaluate(f"document.getElementById('{name}').value = {str(value)!r}")


def press(page: Chromium, name: str) -> None:
    page.evaluate(f"document.getElementById('{name}').click()")


def pixels_of(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(np.int64)


def test_it_draws_both_engines_and_their_difference(page: Chromium, server: LiveServer) -> None:
    press(page, "draw")
    wait_for(page, COMPARED)
    one, other = map(pixels_of, page.evaluate(PICTURES))
    drawn = pixels_of(server.draw().data["data"][0]["b64_json"])
    assert np.abs(one - drawn).max() <= 1
    psnr = 10 * np.log10(255**2 / np.mean((one - other) ** 2))
    assert page.evaluate("document.querySelector('#psnr').textContent") == f"PSNR {psnr:.1f} dB"
    assert np.array_equal(pixels_of(page.evaluate(PAINTED)), np.minimum(255, 8 * np.abs(one - other)))
    page.evaluate("(s => { s.value = '3'; s.dispatchEvent(new Event('input')) })(document.querySelector('#amplify'))")
    assert np.array_equal(pixels_of(page.evaluate(PAINTED)), np.minimum(255, 3 * np.abs(one - other)))
    assert page.evaluate("[...document.querySelectorAll('progress')].every(bar => bar.position === 1)")


def test_it_draws_one_engine_alone(page: Chromium) -> None:
    fill(page, model="fp")
    press(page, "draw")
    wait_for(page, f"document.querySelector('#pictures img')?.hidden === false && {READY}")
    assert len(page.evaluate(PICTURES)) == 1
    assert page.evaluate("document.querySelector('#comparison').hidden")
    assert page.evaluate("document.querySelector('#pictures img').alt").startswith(PROMPT)


def test_it_shows_how_far_it_is_and_stops(page: Chromium, server: LiveServer) -> None:
    fill(page, steps=MANY_STEPS)
    press(page, "draw")
    wait_for(page, "document.querySelector('progress')?.value > 0")
    assert page.evaluate("document.querySelector('progress').position") < 1
    assert f"of {MANY_STEPS + 1} steps" in page.evaluate("document.querySelector('.said').textContent")
    press(page, "stop")
    wait_for(page, READY)
    server.wait_for(lambda: server.metric("s2p_active_requests", model="small") == 0, 2)
    assert page.evaluate("document.querySelector('#problem').hidden")


def test_every_control_has_a_label_and_a_narrow_window_holds_all(page: Chromium) -> None:
    controls = "[...document.querySelectorAll('main input, main select, main textarea')]"
    assert page.evaluate(f"{controls}.every(control => control.labels.length === 1)")
    press(page, "draw")
    wait_for(page, COMPARED)
    page.look(360, 800)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_dark_is_dark(page: Chromium) -> None:
    def brightness() -> int:
        found = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, found[4:-1].split(",")))

    light = brightness()
    page.look(1200, dark=True)
    assert light - brightness() > 400


def test_a_refusal_is_told_in_words(browser: str, server: LiveServer) -> None:
    with opened_page(browser, server) as page:
        wait_for(page, READY)
        page.evaluate("document.querySelector('#steps').removeAttribute('max')")
        fill(page, steps=100_000)
        press(page, "draw")
        wait_for(page, TOLD)
        assert "1 to 900 are allowed" in page.evaluate("document.querySelector('#problem').textContent")


def test_it_asks_for_the_token_and_draws_with_it(browser: str, opening: Opening) -> None:
    metrics, token = Metrics(), "a-token-of-some-length"
    openings = {"small": opening("small", metrics)}
    with live_server(openings, metrics=metrics, token=token) as server, opened_page(browser, server) as page:
        wait_for(page, "document.querySelector('#token-field')?.hidden === false")
        fill(page, token=token)
        page.evaluate("document.querySelector('#token').dispatchEvent(new Event('change'))")
        wait_for(page, READY)
        fill(page, steps=STEPS)
        press(page, "draw")
        wait_for(page, f"document.querySelector('#pictures img')?.hidden === false && {READY}")
