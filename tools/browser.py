"""Chromium without a window, spoken to through a pipe (DevTools protocol), for looking at the pages that we make.

with Browser() as browser:
    browser.open("http://127.0.0.1:8765/")
    browser.wait_for("document.title === 'ser-edge'")
    Path("page.png").write_bytes(browser.picture())
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from types import TracebackType
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--remote-debugging-pipe",
    "--disable-background-networking", "--disable-dev-shm-usage",
)  # fmt: skip

WAIT_S = 30.0


class Browser:
    """A browser with one page, while it is entered.

    Raises:
        RuntimeError: there is no Chromium, or it ended by itself.

    Attributes:
        complaints: what the page's console was told, and what the page was refused or failed at, since it was opened.
    """

    def __init__(self) -> None:
        if CHROMIUM is None:
            raise RuntimeError("no Chromium; run: apt install chromium")
        self.complaints: list[str] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        reading, answers = os.pipe()
        commands, writing = os.pipe()
        # The browser reads commands from descriptor 3 and answers on 4.
        script = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
        command = ["bash", "-c", script, CHROMIUM, *OPTIONS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(answers)
        self._writing, self._reading = os.fdopen(writing, "wb", 0), os.fdopen(reading, "rb")
        self._calls = 0
        self._session: str | None = None
        (page,) = [t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self._session = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        self._writing.close()
        self._reading.close()
        self._profile.cleanup()

    def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        self.complaints.clear()
        self._call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def look(self, width: int, height: int, scheme: str = "light", medium: str = "screen") -> None:
        """Set the size of the window, the colour scheme that the user prefers (``light``, ``dark``), and ``print``."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", media=medium, features=features)

    def live_in(self, time_zone: str) -> None:
        """Let the browser be in a time zone: ``Asia/Tokyo``."""
        self._call("Emulation.setTimezoneOverride", timezoneId=time_zone)

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']['exception']['description']}")
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression is true in the page."""
        deadline = time.monotonic() + WAIT_S
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{condition} has not become true in {WAIT_S:g} s")
            time.sleep(0.05)

    def picture(self) -> bytes:
        """Return what the window shows, as PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot")["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters, "sessionId": self._session}
        text = json.dumps({key: value for key, value in message.items() if value is not None})
        self._writing.write(text.encode() + b"\0")
        while (answer := self._next_message()).get("id") != self._calls:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _next_message(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self._reading.read(1)) not in (b"\0", b""):
            content += byte
        if not content:
            raise RuntimeError("Chromium has ended")
        message: dict[str, Any] = json.loads(content)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Log.entryAdded":
            self.complaints.append(message["params"]["entry"]["text"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(message["params"]["exceptionDetails"]["exception"]["description"])
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(str([argument.get("value") for argument in message["params"]["args"]]))
