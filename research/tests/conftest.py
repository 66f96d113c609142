"""The product's own fixtures serve the laboratory's tests too."""

from __future__ import annotations

import pytest

from s2p_research.app import main
from tests.cli.commands import Finished, Run
from tests.cli.conftest import prompts_file
from tests.conftest import _traces_are_remembered, browser, pytest_runtest_setup, shared
from tests.validation.conftest import prompts

__all__ = ["_traces_are_remembered", "browser", "prompts", "prompts_file", "pytest_runtest_setup", "shared"]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run_here(*arguments: object) -> Finished:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Finished(code, *capfd.readouterr())

    return run_here
