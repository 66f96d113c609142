"""Pages in the system's Chromium, by Playwright, which brings no browser of its own along."""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def installed_browser() -> str | None:
    """Finds the program of the system's Chromium."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextmanager
def started_browser(program: str) -> Iterator[Browser]:
    """Starts a headless browser. Playwright's event loop runs in this thread until the end of the context."""
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=program) as browser:
        yield browser


@dataclass
class WatchedPage:
    """A page, what it wrote on the console or threw, and the addresses that it requested from outside."""

    page: Page
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def watched_page(browser: Browser, width: int = 1200) -> Iterator[WatchedPage]:
    """Opens an empty page and watches it."""
    with browser.new_context(viewport={"width": width, "height": 900}) as context:
        opened = WatchedPage(context.new_page())
        opened.page.set_default_timeout(60_000)
        opened.page.on("console", lambda message: opened.problems.append(message.text))
        opened.page.on("pageerror", lambda error: opened.problems.append(str(error)))
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        yield opened
        opened.page.wait_for_timeout(200)  # for what comes late


def foreign(requests: list[str], own: str = "about:") -> list[str]:
    """Leaves out the requests of files, of data within the page, and those to the page's ``own`` server."""
    return [url for url in requests if not url.startswith((own, "file:", "data:", "blob:"))]


def wait_until(page: Page, expression: str, seconds: float = 60) -> None:
    """Waits for a JavaScript expression to be true. Playwright's own ``wait_for_function`` needs ``unsafe-eval``."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not true within {seconds} s: {expression}"
        page.wait_for_timeout(50)
