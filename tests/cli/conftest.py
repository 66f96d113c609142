"""The command line in this process, and one small chain of artifacts that it made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from s2p_deploy.cli import main
from tests.cli.commands import PROMPTS, Chain, Finished, Run, quick_settings

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run_here(*arguments: object) -> Finished:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Finished(code, *capfd.readouterr())

    return run_here


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "two.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def made_chain(tmp_path_factory: pytest.TempPathFactory, prompts_file: Path) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    chain = Chain(prompts_file, folder / "calib", folder / "graph", folder / "engine")
    commands: list[list[object]] = [
        ["calibrate", "shapes", "--recipe", "w8a8", "--prompts", prompts_file, "--out", chain.calib, *quick_settings()],
        ["export", chain.calib, "--out", chain.graph],
        ["build", chain.graph, "--backend", "onnxruntime", "--out", chain.engine],
    ]
    for command in commands:
        assert main([str(part) for part in command]) == 0, command
    return chain


@pytest.fixture
def chain(made_chain: Chain, tmp_path: Path) -> Chain:
    """A copy of the chain that a test may spoil."""
    folder = tmp_path / "chain"
    shutil.copytree(made_chain.calib.parent, folder)
    return Chain(made_chain.prompts, folder / "calib", folder / "graph", folder / "engine")


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """What is in a folder: every file's bytes by name."""

    def take(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }

    return take
