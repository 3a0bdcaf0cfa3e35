"""A headless Chromium, driven by the DevTools protocol over a pipe; nothing else is needed."""

import fcntl
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-pipe",
)  # fmt: skip
_TIMEOUT_S = 60


def find_chromium() -> str | None:
    """The program, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One page. `events` holds everything that the browser reported, as the protocol names it."""

    def __init__(self, program: str, profile: Path):
        """Start it with an empty folder as its profile."""
        child_in, self._to = _high_pipe()
        self._from, child_out = _high_pipe()

        def connect() -> None:  # the protocol's pipes are always 3 and 4
            os.dup2(child_in, 3)
            os.dup2(child_out, 4)

        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            close_fds=False, preexec_fn=connect,
        )  # fmt: skip
        os.close(child_in)
        os.close(child_out)
        self.events: list[dict[str, Any]] = []
        self._number, self._rest, self._session = 0, b"", {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command; events that arrive before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next_message()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _next_message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], _TIMEOUT_S)
            data = os.read(self._from, 1 << 20) if ready else b""
            assert data, f"Chromium does not answer (exit code {self._process.poll()})"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def show(self, page: Path, width: int, height: int, scheme: str = "light") -> None:
        """Open a file in a window of this size and wait until it is loaded."""
        self.resize(width, height)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next_message())

    def resize(self, width: int, height: int) -> None:
        """Set the window's size in CSS px."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression after two frames have been drawn."""
        script = (
            "new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f)))"
            f".then(() => ({expression}))"
        )
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                           awaitPromise=True)  # fmt: skip
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key. code: its Windows virtual key code."""
        for kind in ("keyDown", "keyUp"):
            words = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                      **words)  # fmt: skip

    def close(self) -> None:
        """End the browser."""
        self._session = {}
        self.call("Browser.close")
        self._process.wait(_TIMEOUT_S)
        os.close(self._to)
        os.close(self._from)


def _high_pipe() -> tuple[int, int]:
    """A pipe whose ends are not descriptors 3 and 4."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]
