"""The application: its commands in panels, their help, and examples that parse."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from typer.main import get_command

from s2p_deploy.cli.app import EXAMPLES, PANELS, app
from tests.cli.commands import Run

COMMANDS = [command for commands in PANELS.values() for command in commands]
GROUP: Any = get_command(app)


def name_of(command: Callable[..., int]) -> str:
    return command.__name__.replace("_", "-")


def test_help_shows_every_command_in_its_panel(run: Run) -> None:
    shown = run("--help").out
    places = [shown.index(f"─ {panel} ─") for panel in PANELS]
    assert places == sorted(places)
    assert {name_of(command) for command in COMMANDS} == set(GROUP.commands)


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_a_command_has_an_example_that_parses(command: Callable[..., int]) -> None:
    words = shlex.split(EXAMPLES[command])
    assert words[:2] == ["s2p-deploy", name_of(command)]
    GROUP.commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_the_same_option_means_the_same_in_every_command(command: Callable[..., int]) -> None:
    defaults = {name: one.default for name, one in inspect.signature(command).parameters.items()}
    assert defaults["as_json"] is False
    assert defaults.get("device", "auto") == "auto"
    assert defaults.get("force", False) is False
    assert defaults.get("threads") in {None, inspect.Parameter.empty}


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_every_option_has_a_help_text(command: Callable[..., int]) -> None:
    without = [one.name for one in GROUP.commands[name_of(command)].params if not one.help]
    assert without == []
