"""Headless Chromium over its own debugging pipe: no driver, no port, no package beside the browser itself."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_ENTER = {"key": "Enter", "code": "Enter", "text": "\r", "windowsVirtualKeyCode": 13}
_QUIET_S = 0.2  # how long late events are waited for
_ABOVE = 10  # file descriptors below are the child's own 3 and 4, or someone else's


class Chromium:
    """One page of a browser; ``problems`` are console messages, exceptions and violations, ``requests`` go outside."""

    def __init__(self, binary: str, timeout_s: float = 60.0) -> None:
        self._timeout = timeout_s
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        (child_in, self._write), (self._read, child_out) = (
            tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for end in ends) for ends in (_pipe(), _pipe())
        )
        script = f'exec "$@" 3<&{child_in} 4>&{child_out}'
        command = [
            "bash",
            "-c",
            script,
            "bash",
            binary,
            *_FLAGS,
            f"--user-data-dir={self._profile.name}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            command, pass_fds=(child_in, child_out), stderr=subprocess.DEVNULL, start_new_session=True
        )
        os.close(child_in)
        os.close(child_out)
        self._buffer, self._count, self._session = b"", 0, ""
        self.problems: list[str] = []
        self.requests: list[str] = []

    def __enter__(self) -> Self:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # its own session: nobody else's processes
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def open(self, file: Path) -> None:
        """Loads a file and waits until it is painted."""
        self._call("Page.navigate", url=file.resolve().as_uri())
        self.evaluate(
            "new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))"
        )
        self.settle()

    def look(self, width: int, height: int = 900, *, dark: bool = False, scale: float = 1, media: str = "") -> None:
        """The size of the window in CSS pixels, the colour scheme, and ``print`` where the page is to look so."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.settle()

    def evaluate(self, expression: str) -> Any:  # noqa: ANN401 - JSON
        """The value of a JavaScript expression, awaited, as JSON."""
        found = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def press_enter(self) -> None:
        """The Enter key, on what has the focus."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, **_ENTER)

    def click(self, x: float, y: float) -> None:
        """The left mouse button, at CSS pixels of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, top: float = 0, height: float | None = None) -> bytes:
        """A PNG of the window, or of ``height`` pixels of the page from ``top`` on."""
        if height is None:
            return base64.b64decode(self._call("Page.captureScreenshot")["data"])
        width = self.evaluate("innerWidth")
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        return base64.b64decode(self._call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])

    def pdf(self) -> bytes:
        """The page as it prints."""
        return base64.b64decode(self._call("Page.printToPDF", printBackground=False)["data"])

    def settle(self) -> None:
        """Two frames, then events that come late."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")
        for message in self._messages(_QUIET_S):
            self._note(message)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        os.write(
            self._write, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        for found in self._messages(self._timeout):
            if found.get("id") != self._count:
                self._note(found)
                continue
            if "error" in found:
                raise RuntimeError(f"{method}: {found['error']}")
            result: dict[str, Any] = found["result"]
            return result
        raise TimeoutError(f"Chromium did not answer {method} within {self._timeout} s")

    def _messages(self, seconds: float) -> Iterator[dict[str, Any]]:
        end = time.monotonic() + seconds
        while True:
            while b"\0" in self._buffer:
                text, self._buffer = self._buffer.split(b"\0", 1)
                yield json.loads(text)
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("Chromium ended")
            self._buffer += part

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method in {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}:
            self.problems.append(json.dumps(params))
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(
            ("file:", "data:", "about:")
        ):
            self.requests.append(params["request"]["url"])


def _pipe() -> tuple[int, int]:
    return os.pipe()
