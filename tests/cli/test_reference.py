"""docs/reference/cli.md is generated from the commands."""

from __future__ import annotations

import runpy
from pathlib import Path

TOOL = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "cli_reference.py"))


def test_the_committed_reference_is_current() -> None:
    assert TOOL["PAGE"].read_text(encoding="utf-8") == TOOL["reference"](), "run python tools/cli_reference.py"
