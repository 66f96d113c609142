"""``generate`` with engines of ControlNets: on the device that is asked for, and closed at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.small_controlnets import OpenedEngines, control_picture

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from tests.cli.commands import Chain, Run


def test_engines_of_controlnets_have_the_device_and_are_closed(
    run: Run, made_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the drawing fails, here as the engine takes none."""
    engines = OpenedEngines()
    monkeypatch.setattr("s2p_deploy.pipeline.open_controlnet", engines)
    control_picture().save(tmp_path / "edges.png")
    edges = ("--controlnet", tmp_path, "--control-image", tmp_path / "edges.png")
    asked = ("--prompt", "a red circle", "--steps", 2, "--out", tmp_path / "out.png", "--device", "cpu")
    done = run("generate", made_chain.engine, *asked, *edges, *edges)
    assert (done.code, "this engine takes no ControlNet" in done.err) == (2, True), done.err
    assert (engines.devices, engines.open) == (["cpu", "cpu"], 0)
