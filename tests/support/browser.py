"""A headless Chromium, spoken to in its DevTools protocol through a pair of pipes."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Page", "find_browser", "open_page"]

# The code of a key, and what it types.
KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "Space": (32, " ")}
KEYS |= {"ArrowUp": (38, ""), "ArrowRight": (39, ""), "ArrowDown": (40, "")}
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser() -> str:
    """The browser's program. Where there is none the test is skipped; in CI it fails."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    message = f"no browser ({', '.join(NAMES)}): apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


class Page:
    """A page in the browser, and what the browser has told about it.

    Args:
        to_browser, from_browser: Ends of the pipes, messages in JSON with a zero byte after each.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, from_browser
        self.events: list[dict[str, Any]] = []
        self.sent, self.received, self.session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser for something; its answer."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.sent:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def open(self, what: Path | str, width: int, height: int, dark: bool = False) -> None:
        """Show a file or an address at a size in pixels, and wait until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        url = what if isinstance(what, str) else what.resolve().as_uri()
        self.call("Page.navigate", url=url)
        while not self.told("Page.loadEventFired"):
            self.events.append(self._next())
        # What the page would do later, it has done once this is answered after its idle time.
        self.evaluate("new Promise(done => setTimeout(done, 300))")

    def told(self, method: str) -> list[dict[str, Any]]:
        """The parameters of the events of a kind since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, or of its promise."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout: float = 60) -> Any:
        """Wait until a JavaScript expression is true, and return its value."""
        end = time.monotonic() + timeout
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"not within {timeout} s: {expression}"
            time.sleep(0.1)
        return value

    def upload(self, selector: str, path: Path) -> None:
        """Choose a file in the form's field that a CSS selector finds."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        found = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=found, files=[str(path)])

    def drop(self, selector: str, path: Path) -> None:
        """Drag a file onto the element that a CSS selector finds."""
        box = f"(e => e.getBoundingClientRect())(document.querySelector({selector!r}))"
        x, y = self.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def press(self, key: str) -> None:
        """Press a key, such as "Tab", "Enter" or "ArrowRight", where the focus is."""
        code, text = KEYS.get(key, (0, ""))
        named = {"key": text or key, "code": key, "windowsVirtualKeyCode": code, "text": text}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **named)
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def errors(self) -> list[str]:
        """What the console has told as an error since the page was opened."""
        entries = [told["entry"] for told in self.told("Log.entryAdded")]
        found = [f"{e['text']} {e.get('url', '')}" for e in entries if e["level"] == "error"]
        calls = [told for told in self.told("Runtime.consoleAPICalled") if told["type"] == "error"]
        found += [str([one.get("value") for one in call["args"]]) for call in calls]
        return found + [str(told) for told in self.told("Runtime.exceptionThrown")]

    def requested(self) -> list[str]:
        """The addresses that the page has asked for since it was opened."""
        return [told["request"]["url"] for told in self.told("Network.requestWillBeSent")]

    def screenshot(self, path: Path) -> None:
        """Save the whole page as a PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _next(self, timeout: float = 60) -> dict[str, Any]:
        end = time.monotonic() + timeout
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.from_browser], [], [], end - time.monotonic())
            assert ready, "the browser does not answer"
            read = os.read(self.from_browser, 1 << 20)
            assert read, "the browser has ended"
            self.received += read
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)


@contextmanager
def open_page(profile: Path) -> Iterator[Page]:
    """Start the browser with an empty profile in a folder; it ends with the context."""
    browser = find_browser()
    commands, answers = os.pipe(), os.pipe()

    def connect() -> None:  # the browser reads from descriptor 3 and writes to 4
        read, write = os.dup(commands[0]), os.dup(answers[1])
        os.dup2(read, 3)
        os.dup2(write, 4)

    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    process = subprocess.Popen(
        [browser, *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
        preexec_fn=connect,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands[0])
    os.close(answers[1])
    try:
        yield Page(commands[1], answers[0])
    finally:
        process.kill()
        process.wait()
        os.close(commands[1])
        os.close(answers[0])
