"""``serve`` on the command line, and as the process that it is."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from s2p_deploy.cli import main
from tests.small_pipelines import tiny_base

if TYPE_CHECKING:
    from collections.abc import Iterator

    from s2p_deploy.serve.http.images import HttpLimits
    from s2p_deploy.serve.http.server import Listening
    from tests.cli.commands import Run

COMMAND = [sys.executable, "-c", "import sys; from s2p_deploy.cli import main; sys.exit(main())", "serve"]
BLOCKED = """
import sys
sys.modules[sys.argv[1]] = None  # importing it now raises ModuleNotFoundError
from s2p_deploy.cli import main
sys.exit(main(["serve", "engine"]))
"""
IP_ADAPTER = "ip-adapters/scenes/ip-adapter.safetensors"
SLOW = {"prompt": "a large red circle", "num_inference_steps": 500, "seed": 1}


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A floating-point engine whose step takes a millisecond, beside its graph."""
    folder = tmp_path_factory.mktemp("served")
    tiny_base(folder / "pipeline")
    commands = [
        ["calibrate", folder / "pipeline", "--recipe", "fp", "--set", "sampling.steps=100", "--out", folder / "calib"],
        ["export", folder / "calib", "--out", folder / "graph"],
        ["build", folder / "graph", "--backend", "onnxruntime", "--out", folder / "engine"],
    ]
    for command in commands:
        assert main([str(part) for part in command]) == 0, command
    return folder / "engine"


@contextmanager
def serving(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, on a free port."""
    command = [*COMMAND, *map(str, arguments), "--port", "0", "--max-steps", "500"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ask(port: int, form: dict[str, object]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/images/generations", json.dumps(form), {"content-type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def unanswered(port: int, form: dict[str, object]) -> None:
    """Asks, and expects nothing."""
    with suppress(OSError, http.client.HTTPException):
        ask(port, form)


def active(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    return any(line.startswith("s2p_active_requests{") and not line.endswith(" 0.0") for line in text.splitlines())


@pytest.mark.parametrize("package", ["fastapi", "greenlet", "prometheus_client", "uvicorn"])
def test_without_its_extra_it_says_what_to_install(package: str) -> None:
    run = subprocess.run([sys.executable, "-c", BLOCKED, package], capture_output=True, text=True, check=False)
    assert run.returncode == 4
    assert run.stderr == f"s2p-deploy: serve needs {package}: pip install 's2p-deploy[serve]'\n"


def test_a_port_that_is_taken_is_one_line(run: Run, tiny_engine: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", tiny_engine, "--port", port)
    assert (done.code, done.out) == (2, "")
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "no such host"], "cannot listen on"),
        (["--name", "a/b"], "no name for a model"),
        (["--name", ""], "no name for a model"),
        (["--size", "64"], "WIDTHxHEIGHT"),
        (["--batching", "none"], "--batching"),
        (["--max-active", "0"], "--max-active"),
        (["--timeout", "0"], "--timeout"),
        (["--port", "70000"], "--port"),
        (["--token-file", "no-such-file"], "cannot be read as a token"),
        (["--lora", "ink.safetensors"], "must be NAME=FILE"),
        (["--lora", "a/b=ink.safetensors"], "must be NAME=FILE"),
        (["--lora", "ink=no-such-file"], "no-such-file does not exist"),
        (["--lora-memory", "0"], "--lora-memory"),
    ],
)
def test_options_that_make_no_sense_are_refused(run: Run, tiny_engine: Path, options: list[str], said: str) -> None:
    done = run("serve", tiny_engine, *options)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_a_second_engine_is_not_for_replicas(run: Run, tiny_engine: Path) -> None:
    pytest.importorskip("ray")
    done = run("serve", tiny_engine, "--ray", "--against", tiny_engine)
    assert (done.code, done.out) == (2, "")
    assert "--against cannot be used with --ray" in done.err


@pytest.mark.parametrize(("option", "path"), [("--controlnet", "controlnets/edges"), ("--ip-adapter", IP_ADAPTER)])
def test_pictures_may_come_with_prompts_where_an_adapter_reads_them(
    run: Run, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, option: str, path: str
) -> None:
    allowed = []

    def not_run(_models: object, limits: HttpLimits, _metrics: object, listening: Listening, **_: object) -> None:
        listening.socket.close()
        allowed.append(limits.adapter_pictures)

    monkeypatch.setattr("s2p_deploy.serve.http.server.run_server", not_run)
    for options in ([], [option, f"edges=tests/assets/{path}"]):
        assert run("serve", tiny_engine, "--port", 0, *options).code == 0
    assert allowed == [False, True]


@pytest.mark.parametrize("content", ["", "short", "a token with spaces in it", "é" * 20])
def test_a_token_must_be_one(run: Run, tiny_engine: Path, tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.write_text(content, encoding="utf-8")
    done = run("serve", tiny_engine, "--token-file", file)
    assert (done.code, done.out) == (2, "")
    assert str(file) in done.err


def test_a_token_of_the_environment_must_be_one_too(
    run: Run, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S2P_SERVE_TOKEN", "short")
    done = run("serve", tiny_engine)
    assert done.code == 2
    assert "S2P_SERVE_TOKEN" in done.err


def test_an_artifact_of_another_kind_is_refused(run: Run, tiny_engine: Path) -> None:
    assert run("serve", tiny_engine.parent / "graph").code == 2


def test_ctrl_c_leaves_nothing_to_go_on_with(run: Run, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_models: object, _limits: object, _metrics: object, listening: Listening, **_: object) -> None:
        listening.socket.close()
        raise KeyboardInterrupt

    monkeypatch.setattr("s2p_deploy.serve.http.server.run_server", interrupted)
    done = run("serve", tiny_engine, "--port", 0)
    assert (done.code, done.err) == (130, "s2p-deploy: stopped\n")


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_the_running_request_finish(tiny_engine: Path, sent: signal.Signals, code: int) -> None:
    answers: list[tuple[int, bytes]] = []
    with serving(tiny_engine, "--name", "mine") as process:
        first = line_of(process)
        assert first.startswith("serving mine on http://127.0.0.1:")
        port = int(first.rsplit(":", 1)[1])
        assert line_of(process).startswith("ready after ")
        client = threading.Thread(target=lambda: answers.append(ask(port, SLOW)))
        client.start()
        while client.is_alive() and not active(port):
            time.sleep(0.01)
        process.send_signal(sent)
        client.join()
        assert process.wait(60) == code
        assert process.stderr is not None
        said = process.stderr.read()
    assert [status for status, _ in answers] == [200]
    assert "closing: requests that run have 30 s" in said
    assert "Traceback" not in said
    own = [line for line in said.splitlines() if line.startswith("s2p-deploy: ")]
    assert own == (["s2p-deploy: stopped"] if sent == signal.SIGINT else [])


@pytest.mark.slow
def test_what_is_not_done_in_time_is_answered_and_the_end_is_in_order(tiny_engine: Path) -> None:
    answers: list[tuple[int, bytes]] = []
    with serving(tiny_engine, "--drain-seconds", "0", "--json") as process:
        told = json.loads(line_of(process))
        assert told["models"] == ["engine"]
        port = int(told["url"].rsplit(":", 1)[1])
        client = threading.Thread(target=lambda: answers.append(ask(port, SLOW)))
        client.start()
        while client.is_alive() and not active(port):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        client.join()
        assert process.wait(60) == 0
        assert line_of(process) == ""
    assert [(status, b"closing" in body) for status, body in answers] == [(503, True)]


@pytest.mark.slow
def test_a_second_signal_does_not_wait(tiny_engine: Path) -> None:
    with serving(tiny_engine, "--drain-seconds", "600") as process:
        port = int(line_of(process).rsplit(":", 1)[1])
        line_of(process)
        wish = SLOW | {"n": 4}
        clients = [threading.Thread(target=unanswered, args=(port, wish), daemon=True) for _ in range(8)]
        for client in clients:
            client.start()
        while not active(port):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr is not None
        said = process.stderr.read()
        assert "Traceback" not in said
        assert time.monotonic() - start < 10  # of the 600 that they had


@pytest.mark.slow
def test_an_engine_that_was_changed_ends_the_server(tiny_engine: Path, tmp_path: Path) -> None:
    """The port is open already when an engine's own files are hashed."""
    changed = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    (changed / "denoiser.onnx").write_bytes(b"changed")
    with serving(changed) as process:
        assert process.wait(120) == 5
        assert process.stderr is not None
        said = process.stderr.read()
    assert "denoiser.onnx" in said.splitlines()[-1]
    assert "Traceback" not in said
