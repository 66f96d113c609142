"""docs/support.md: what benchmarks/support_page.py makes of the tables that ship, and nothing else."""

from __future__ import annotations

from pathlib import Path

from benchmarks.support_page import page, shipped_files
from s2p_deploy.engines.support_tables import read_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "support.md"


def test_the_committed_page_is_what_the_script_makes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(shipped_files())


def test_every_shipped_table_has_its_section() -> None:
    text = PAGE.read_text(encoding="utf-8")
    keys = [read_table(file).key for file in shipped_files()]
    assert keys
    assert [key for key in keys if f"## {key.backend} {key.version}\n" not in text] == []
