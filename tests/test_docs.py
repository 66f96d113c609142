"""The documentation: the options that it names exist, its links lead somewhere, and it stays within its length."""

from __future__ import annotations

import ast
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.main import get_command

import s2p_deploy
from benchmarks.pages.write import page_names
from s2p_deploy.cli.app import app
from s2p_deploy.recipe import Recipe
from tests.browser import foreign, wait_until, watched_page

if TYPE_CHECKING:
    from collections.abc import Iterable

    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GENERATED = {*page_names(), "reference/cli.md"}
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
BY_HAND = [name for name in PAGES if name not in GENERATED]
MAX_WORDS, MAX_README_WORDS = 12_000, 1_000


def words(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").split())


def commands_in_the_text(path: Path, names: Iterable[str]) -> list[list[str]]:
    """The arguments of commands in the text that have options. Whole commands are run: tests/test_docs_commands.py."""
    of_any = rf"`(?:s2p-deploy )?((?:{'|'.join(names)}) [^`\n]*--[^`\n]*)`"
    return [shlex.split(match) for match in re.findall(of_any, path.read_text(encoding="utf-8"))]


def test_it_is_short() -> None:
    assert sum(words(DOCS / name) for name in BY_HAND) <= MAX_WORDS
    assert words(ROOT / "README.md") <= MAX_README_WORDS


@pytest.mark.parametrize("page", [*(f"docs/{name}" for name in BY_HAND), "README.md", "CONTRIBUTING.md"])
def test_options_in_its_text_exist(page: str) -> None:
    known = get_command(app).commands  # type: ignore[attr-defined] # a group
    for name, *arguments in commands_in_the_text(ROOT / page, known):
        options = {
            option for parameter in known[name].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        given = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
        assert given <= options, (page, name)


@pytest.mark.parametrize("page", BY_HAND)
def test_its_recipes_are_valid_and_its_python_can_be_parsed(page: str, tmp_path: Path) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        Recipe.load(str(file))
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "s2p_deploy":
                assert {alias.name for alias in node.names} <= set(s2p_deploy.__all__)


@pytest.mark.parametrize("page", [*(f"docs/{name}" for name in PAGES), "README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_its_links_lead_somewhere(page: str) -> None:
    file = ROOT / page
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", file.read_text(encoding="utf-8"))
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == set(PAGES)


@pytest.mark.slow
def test_the_site_is_read_and_searched_from_disk_without_a_network(browser: Browser) -> None:
    site = ROOT / "build" / "site"
    if not (site / "index.html").exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no site here: `make docs` builds it")
    with watched_page(browser) as opened:
        for name in PAGES:
            opened.page.goto((site / name).with_suffix(".html").as_uri())
            assert opened.page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        opened.page.goto((site / "index.html").as_uri())
        box = opened.page.locator("input.md-search__input")
        box.click()
        box.press_sequentially("lowering")  # the theme listens to keys; a filled box it reads 1 ms after its focus
        wait_until(opened.page, "document.querySelectorAll('.md-search-result__item').length > 0")
    assert opened.problems == []
    assert foreign(opened.requests) == []
