"""A real tritonserver on the CPU, of the nvidia-pytriton wheel unpacked into a folder (``make triton``)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
READY_SECONDS = 500.0


def unpacked() -> Path:
    """Where the wheels are unpacked; the test is skipped where they are not."""
    place = Path(os.environ.get("S2P_TRITON") or ROOT / ".venv" / "triton")
    stub = place / "pytriton" / "tritonserver" / "python_backend_stubs" / _python() / "triton_python_backend_stub"
    if not stub.is_file() or not (place / "numpy1").is_dir():
        pytest.skip("no tritonserver for this Python: make triton unpacks one, or S2P_TRITON says where it is")
    return place


@dataclass(frozen=True)
class RealServer:
    """A server that runs, or one that gave up."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def triton_server(repository: Path, scratch: Path) -> Iterator[RealServer]:
    """Serves a repository; returns when it is ready, or has ended."""
    place, port = unpacked(), _free_port()
    server = _installed(place, scratch / "tritonserver")
    # a folder named triton in the working directory would stand in for the compiler of that name
    cwd, log = scratch / "cwd", scratch / "log.txt"
    cwd.mkdir()
    command = [server / "bin" / "tritonserver", "--model-repository", repository, "--http-port", port]
    command += ["--backend-directory", server / "backends", "--http-address", "127.0.0.1", "--allow-grpc", "false"]
    command += ["--allow-metrics", "false", "--exit-timeout-secs", "10"]
    command += ["--backend-config", f"python,shm-region-prefix-name=s2p_test_{port}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=_environment(place, scratch),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    running = RealServer(f"127.0.0.1:{port}", process, log)
    try:
        _wait_until_ready(running)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _installed(place: Path, out: Path) -> Path:
    """The server with the Python backend's stub for this Python where it is looked for; wheels lose the x bits."""
    source = place / "pytriton" / "tritonserver"
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("python_backend_stubs"))
    stub = out / "backends" / "python" / "triton_python_backend_stub"
    shutil.copyfile(source / "python_backend_stubs" / _python() / stub.name, stub)
    for program in (stub, out / "bin" / "tritonserver"):
        program.chmod(0o755)
    return out


def _environment(place: Path, scratch: Path) -> dict[str, str]:
    """The first Python on the path is this one with an older NumPy: this server's backend knows none from 2 on."""
    python = scratch / "python"
    venv.create(python, symlinks=True)
    site = python / "lib" / f"python{_python()}" / "site-packages"
    paths = [str(place / "numpy1"), f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})"]
    (site / "s2p.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    libraries = f"{sysconfig.get_config_var('LIBDIR')}:{place / 'nvidia_pytriton.libs'}"
    own = {"PATH": f"{python / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": libraries}
    return os.environ | own | {"XDG_CACHE_HOME": str(scratch / "cache"), "OMP_NUM_THREADS": "1"}


def _wait_until_ready(server: RealServer) -> None:
    end = time.monotonic() + READY_SECONDS
    while server.process.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(f"http://{server.url}/v2/health/ready", timeout=5)
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
        else:
            return


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
