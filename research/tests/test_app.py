from __future__ import annotations

import pytest

from s2p_research.app import main


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "recipes" in capsys.readouterr().out


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compere"]) == 2
    assert "s2p_research --help" in capsys.readouterr().err
