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

    from tests.shared_folder import SharedFolder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run_here(*arguments: object) -> Finished:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Finished(code, *capfd.readouterr())

    return run_here


@pytest.fixture(scope="session")
def prompts_file(shared: SharedFolder) -> Path:
    return shared.made("two-prompts.txt", lambda path: path.write_text(PROMPTS, encoding="utf-8"))


@pytest.fixture(scope="session")
def made_chain(shared: SharedFolder, prompts_file: Path) -> Chain:
    def make(folder: Path) -> None:
        folder.mkdir()
        made = chain_in(folder, prompts_file)
        settings = ["--prompts", prompts_file, *quick_settings()]
        commands: list[list[object]] = [
            ["calibrate", "shapes", "--recipe", "w8a8", "--out", made.calib, *settings],
            ["export", made.calib, "--out", made.graph],
            ["build", made.graph, "--backend", "onnxruntime", "--out", made.engine],
        ]
        for command in commands:
            assert main([str(part) for part in command]) == 0, command

    return chain_in(shared.made("command-line-chain", make), prompts_file)


def chain_in(folder: Path, prompts: Path) -> Chain:
    return Chain(prompts, folder / "calib", folder / "graph", folder / "engine")


@pytest.fixture
def chain(made_chain: Chain, tmp_path: Path) -> Chain:
    """A copy of the chain that a test may spoil."""
    folder = tmp_path / "chain"
    shutil.copytree(made_chain.calib.parent, folder)
    return chain_in(folder, made_chain.prompts)


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """What is in a folder: every file's bytes by name."""

    def take(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }

    return take
