"""A headless Chromium over its debugging pipe: what a page looks like, fetches and complains about.

python -m tests.browser PAGE.html OUT.png [--dark] [--width 1280] [--height 0]
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

ANSWER = 120.0  # seconds until a browser that says nothing is given up, on a machine busy with other things
LEAVE = 10.0  # seconds it has to close by itself


class Browser:
    """One page of a browser of its own profile, with every process of it gone when the context is left.

    Raises:
        AssertionError: the browser ends, or answers with an error.
        TimeoutError: it does not answer within `answer` seconds.
    """

    def __init__(self, program: str | None = CHROMIUM, answer: float = ANSWER) -> None:
        assert program, "no chromium here"
        self._answer = answer
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--remote-debugging-pipe", "--disable-extensions", "--disable-component-update", "--no-first-run"]
        # The browser reads commands from descriptor 3 and answers on 4.
        script = f'exec 3<&{to_read} 4>&{to_write}; exec "$@"'
        command = ["bash", "-c", script, "-", program, *flags, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL, start_new_session=True
        )
        os.close(to_read)
        os.close(to_write)
        self._number, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        try:
            target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Network", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._leave()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(OSError):
            self._send("Browser.close", {}, None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LEAVE)
        self._leave()

    def _leave(self) -> None:
        """End what is left of the browser, and only then remove the profile it writes into."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        late = time.monotonic() + self._answer
        while members(self._process.pid) and time.monotonic() < late:
            time.sleep(0.02)
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = self._send(method, parameters, self._session)
        late = time.monotonic() + self._answer
        while True:
            answer = self._next(late)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _send(self, method: str, parameters: dict[str, Any], session: str | None) -> int:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._number

    def _next(self, late: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, late - time.monotonic()))[0]:
                raise TimeoutError(f"the browser did not answer within {self._answer:g} s")
            more = os.read(self._read, 1 << 20)
            assert more, "the browser has ended"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, width: int, dark: bool) -> None:
        """Load a file as a screen of `width` pixels shows it."""
        self.events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=page.resolve().as_uri())
        late = time.monotonic() + self._answer
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next(late))

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors, warnings and exceptions since the page was opened."""
        methods = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed")
        return [json.dumps(event) for event in self.events if event["method"] in methods]

    def fetched(self) -> list[str]:
        """Addresses asked for, but for what the page holds itself."""
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in (event["params"]["request"]["url"] for event in sent) if not url.startswith("data:")]

    def picture(self, out: Path, height: int = 0) -> None:
        """Screenshot of the whole page, or of its first `height` pixels."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        found = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        out.write_bytes(base64.b64decode(found["data"]))


def members(group: int) -> list[int]:
    """Running processes of a process group; one that has ended and waits to be collected is not running."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=0)
    options = parser.parse_args()
    with Browser() as browser:
        browser.open(options.page, options.width, options.dark)
        browser.picture(options.out, options.height)
        print(json.dumps({"complaints": browser.complaints(), "fetched": browser.fetched()}, indent=2))
