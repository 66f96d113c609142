"""Counts the sessions of ONNX Runtime that are open: what fails half-way must leave none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from s2p_deploy.engines.onnxruntime.runners import OnnxRuntimeRunner

if TYPE_CHECKING:
    import pytest


def watch_runners(monkeypatch: pytest.MonkeyPatch) -> tuple[list[OnnxRuntimeRunner], list[OnnxRuntimeRunner]]:
    """Returns the runners that were opened since, and those of them that are open."""
    opened: list[OnnxRuntimeRunner] = []
    still_open: list[OnnxRuntimeRunner] = []
    begin, end = OnnxRuntimeRunner.__init__, OnnxRuntimeRunner.close

    def init(runner: OnnxRuntimeRunner, *arguments: Any) -> None:  # noqa: ANN401 - a runner's
        begin(runner, *arguments)
        opened.append(runner)
        still_open.append(runner)

    def close(runner: OnnxRuntimeRunner) -> None:
        end(runner)
        if runner in still_open:
            still_open.remove(runner)

    monkeypatch.setattr(OnnxRuntimeRunner, "__init__", init)
    monkeypatch.setattr(OnnxRuntimeRunner, "close", close)
    return opened, still_open
