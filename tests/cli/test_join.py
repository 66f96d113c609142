"""``join`` and the commands that read what it writes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from s2p_deploy.records import Engine
from tests.cli.commands import Chain, Run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.shared_folder import SharedFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def floating(shared: SharedFolder) -> Path:
    from s2p_deploy.cli.app import main

    def make(folder: Path) -> None:
        for command in (
            ["calibrate", "shapes", "--recipe", "fp", "--out", folder / "calib", "--set", "sampling.steps=5"],
            ["export", folder / "calib", "--out", folder / "graph"],
            ["build", folder / "graph", "--backend", "onnxruntime", "--out", folder / "engine"],
        ):
            assert main([str(part) for part in command]) == 0, command

    return shared.made("floating-chain", make) / "engine"


@pytest.fixture
def joined(run: Run, made_chain: Chain, floating: Path, tmp_path: Path) -> Path:
    out = tmp_path / "joined"
    finished = run("join", made_chain.engine, "--low-noise", floating, "--out", out, "--boundary-ratio", 0.3, "--json")
    assert finished.code == 0, finished.err
    assert finished.data["path"] == str(out)
    return out


def test_what_join_writes_is_used_as_an_engine(run: Run, joined: Path, made_chain: Chain, tmp_path: Path) -> None:
    shown = run("inspect", joined)
    assert shown.code == 0
    assert "parent low_noise" in shown.out
    assert "boundary_ratio" in shown.out
    picture = tmp_path / "picture.png"
    assert run("generate", joined, "--prompt", "a large red circle", "--out", picture, "--steps", 5).code == 0
    assert picture.stat().st_size > 0


def test_it_is_validated(run: Run, joined: Path, made_chain: Chain, tmp_path: Path) -> None:
    """Graph and engine are compared as of the first engine alone, which the second one does not follow."""
    out = tmp_path / "report"
    finished = run("validate", joined, "--prompts", made_chain.prompts, "--out", out, "--json")
    assert finished.code in {0, 3}, finished.err
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert "engine below timestep 300, in pictures alone" in report["digests"]
    assert report["sizes"]["engine"] > sum(Engine.open(joined).sizes.values())
    states = {gate["name"]: gate["status"] for gate in report["gates"]}
    assert states["blocks of the engine, worst SQNR"] == "passed", states


def test_triton_is_given_one_engine(run: Run, joined: Path, tmp_path: Path) -> None:
    finished = run("export-triton", joined, "--out", tmp_path / "repository")
    assert finished.code == 2
    assert "two joined engines" in finished.err
    assert not (tmp_path / "repository").exists()


def test_wrong_inputs_are_one_line(run: Run, made_chain: Chain, joined: Path, tmp_path: Path) -> None:
    for arguments, reason in (
        ([made_chain.graph, "--low-noise", made_chain.engine], "is of kind ExportedGraph, expected Engine"),
        ([made_chain.engine, "--low-noise", tmp_path / "none"], "none does not exist"),
        ([joined, "--low-noise", made_chain.engine], "is joined already"),
        ([made_chain.engine, "--low-noise", made_chain.engine, "--boundary-ratio", 2], "leaves one engine nothing"),
    ):
        finished = run("join", *arguments, "--out", tmp_path / "out")
        assert finished.code == 2
        assert reason in finished.err, finished.err
        assert len(finished.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    adapted = ["--lora", "ink.safetensors", "--out", tmp_path / "calib", "--engine", tmp_path / "e", "--like", joined]
    finished = run("adapt", made_chain.calib, *adapted)
    assert finished.code == 2
    assert "is two joined engines: give the first one" in finished.err
