"""A headless Chromium, driven through its own pipe: no library, no port.

`python -m tests.browser http://127.0.0.1:8002/models/magika docs/drift.png` makes a picture of a page.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

FOUND = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
HOW_TO_GET_ONE = "There is none here: install Debian's package `chromium`, or Google Chrome."
SECONDS = 60.0
# The browser reads commands from descriptor 3 and writes to 4, which a child's are not made to be by `subprocess`.
_START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_SWITCHES = (
    "--headless=new",
    "--no-sandbox",  # a container's root has none to give
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Tab:
    """One page. `complaints` is what the browser had to say of it: errors, refusals of its policy, failed loads."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **params)

    def open(self, address: str) -> None:
        """Return when the page is loaded."""
        self._browser.loaded.discard(self._session)
        self.send("Page.navigate", url=address)
        self._browser.wait(lambda: self._session in self._browser.loaded)

    def run(self, script: str) -> Any:
        """The value of an expression; of a promise what it comes to."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Return when an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(f"new Promise(done => requestAnimationFrame(() => done(Boolean({condition}))))"):
            assert time.monotonic() < end, f"never came true: {condition}"

    def look(self, width: int, height: int = 900, *, dark: bool = False, scale: float = 1.0) -> None:
        """As on a screen of so many pixels, in a light or a dark room."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        value = "dark" if dark else "light"
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def keep(self, selector: str) -> None:
        """Hide all but these elements, what is in them and what they are in."""
        self.run(
            f"const kept = [...document.querySelectorAll({json.dumps(selector)})];"
            "for (const one of document.body.querySelectorAll('*'))"
            "  if (!kept.some(k => k.contains(one) || one.contains(k))) one.style.setProperty('display', 'none', 'important')"
        )
        self.wait("document.body.offsetHeight")  # laid out anew

    def close(self) -> None:
        self.send("Page.close")

    def picture(self, *, whole: bool = True) -> bytes:
        """A PNG of all of the page, or of what the screen shows."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"])


class Browser:
    """A Chromium with a profile of its own, for one thread."""

    def __init__(self) -> None:
        assert FOUND, f"this test looks at a page in a browser. {HOW_TO_GET_ONE}"
        self._profile = tempfile.TemporaryDirectory(prefix="calserve-browser-", ignore_cleanup_errors=True)
        (theirs, self._out), (self._in, ours) = os.pipe(), os.pipe()
        command = [FOUND, *_SWITCHES, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs), str(ours), *command],
            pass_fds=(theirs, ours),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(ours)
        self._buffer, self._number = b"", 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._tabs: dict[str, Tab] = {}
        self.loaded: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.send("Browser.close")
        os.close(self._out)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        self._profile.cleanup()

    def tab(self) -> Tab:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._tabs[session] = tab = Tab(self, session)
        return tab

    def send(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        self.wait(lambda: number in self._answers)
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def wait(self, done: Any) -> None:
        end = time.monotonic() + SECONDS
        while not done():
            left = end - time.monotonic()
            assert left > 0 and select.select([self._in], [], [], left)[0], "the browser does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser ended"
            *messages, self._buffer = (self._buffer + data).split(b"\0")
            for message in map(json.loads, messages):
                self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            return
        session, method, params = message.get("sessionId", ""), message["method"], message["params"]
        if method == "Page.loadEventFired":
            self.loaded.add(session)
        elif session in self._tabs and (words := _complaint(method, params)):
            self._tabs[session].complaints.append(words)


def _complaint(method: str, params: dict[str, Any]) -> str:
    if method == "Runtime.exceptionThrown":
        return str(params["exceptionDetails"])
    if method == "Runtime.consoleAPICalled" and params["type"] in {"error", "warning", "assert"}:
        return str(params["args"])
    if method == "Log.entryAdded" and params["entry"]["level"] in {"error", "warning"}:
        return f"{params['entry']['text']} {params['entry'].get('url', '')}"
    return str(params) if method == "Network.loadingFailed" and not params.get("canceled") else ""


DRAWN = "[...document.querySelectorAll('.plot')].every(place => place.querySelector('.main-svg'))"
"""Whether every chart is there."""


@contextlib.contextmanager
def page(address: str, width: int = 1280, *, dark: bool = False, scale: float = 1.0) -> Iterator[Tab]:
    """A page with its charts drawn, in a browser of its own."""
    with Browser() as browser:
        tab = browser.tab()
        tab.look(width, dark=dark, scale=scale)
        tab.open(address)
        tab.wait(DRAWN)
        yield tab


def main() -> None:
    parser = argparse.ArgumentParser(description="a picture of a page")
    parser.add_argument("address")
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=0, help="of the picture; 0: the whole page")
    parser.add_argument("--only", default="", help="CSS selector: these elements, nothing else")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--scale", type=float, default=1.0)
    arguments = parser.parse_args()
    with page(arguments.address, arguments.width, dark=arguments.dark, scale=arguments.scale) as tab:
        if arguments.height:
            tab.look(arguments.width, arguments.height, dark=arguments.dark, scale=arguments.scale)
            tab.wait(DRAWN)
        if arguments.only:
            tab.keep(arguments.only)
        arguments.out.write_bytes(tab.picture(whole=not arguments.height))


if __name__ == "__main__":
    main()
