"""A page in a real headless Chrome or Chromium, driven through its debugging pipe: no driver to install."""

import json
import os
import shutil
import subprocess
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import F_DUPFD, fcntl
from pathlib import Path
from select import select
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
TIMEOUT_S = 60.0


class Page:
    """An open page, what its console said, and what it asked of the network or the disk."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._unread = b""
        self._sent = 0
        self._session: dict[str, str] = {}
        self.errors: list[str] = []
        self.requests: list[str] = []

    def open(self, path: Path) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=path.as_uri())
        while self.run("document.readyState") != "complete":
            time.sleep(0.05)

    def close(self) -> None:
        self._session = {}  # it is the browser that is closed
        self.call("Browser.close")

    def run(self, script: str) -> Any:
        """Return what a JavaScript expression gives."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        path.write_bytes(b64decode(self.call("Page.captureScreenshot")["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command; return its answer. Events that come before it are noted."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters} | self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer["method"], answer["params"])

    def _note(self, event: str, about: dict[str, Any]) -> None:
        is_complaint = event == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning")
        if event in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled") or is_complaint:
            self.errors.append(json.dumps(about))
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select([self._answers], [], [], TIMEOUT_S)
            assert ready, f"the browser has not answered for {TIMEOUT_S:g} s"
            received = os.read(self._answers, 2**16)
            assert received, "the browser has ended"
            self._unread += received
        message, self._unread = self._unread.split(b"\0", 1)
        return json.loads(message)


@contextmanager
def opened(path: Path, profile: Path) -> Iterator[Page]:
    """Open a file in a browser of its own, with ``profile`` as its folder, and end that browser afterwards."""
    assert BROWSER
    commands_out, commands = os.pipe()
    answers, answers_in = os.pipe()
    # The protocol wants its pipes as descriptors 3 and 4; copies out of that range cannot hide each other.
    ends = [fcntl(descriptor, F_DUPFD, 10) for descriptor in (commands_out, answers_in)]
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    script = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
    browser = subprocess.Popen(
        ["bash", "-c", script, "bash", BROWSER, *flags], pass_fds=ends, stderr=subprocess.DEVNULL
    )
    for descriptor in (commands_out, answers_in, *ends):
        os.close(descriptor)
    try:
        page = Page(commands, answers)
        page.open(path)
        yield page
        page.close()
        browser.wait(TIMEOUT_S)
    finally:
        browser.kill()
        browser.wait()
        os.close(commands)
        os.close(answers)
