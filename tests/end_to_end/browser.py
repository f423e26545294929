"""A headless Chromium, spoken to over its debugging pipe: no driver, no port, no further package."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

_FLAGS = [
    "--headless",
    "--no-sandbox",  # it opens our own page only, and cannot have a sandbox in most containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
]


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """with Browser(program, profile_folder) as page: page.open(url); page.evaluate("1 + 1")"""

    def __init__(self, program: str, profile: Path, width: int = 1500, height: int = 1900) -> None:
        their_input, our_output = os.pipe()
        our_input, their_output = os.pipe()
        # The pipe's two ends are the browser's descriptors 3 and 4, by Chromium's convention.
        script = f'exec "$@" 3<&{their_input} 4>&{their_output}'
        command = [
            program,
            *_FLAGS,
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(their_input, their_output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_input)
        os.close(their_output)
        self._to, self._from = os.fdopen(our_output, "wb"), os.fdopen(our_input, "rb")
        self._numbers, self._buffer, self._session = itertools.count(1), b"", None
        pages = [info for info in self._call("Target.getTargets")["targetInfos"] if info["type"] == "page"]
        attached = self._call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._to.close()
        self._from.close()

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_until(self, script: str, timeout_s: float) -> bool:
        """Whether `script` became true within the time."""
        end_s = time.monotonic() + timeout_s
        while not self.evaluate(script):
            if time.monotonic() > end_s:
                return False
            time.sleep(0.2)
        return True

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _read(self) -> bytes:
        """The next message; they end with a zero byte."""
        while b"\0" not in self._buffer:
            block = os.read(self._from.fileno(), 1 << 16)
            assert block, f"the browser has ended with code {self._process.wait()}"
            self._buffer += block
        message, _, self._buffer = self._buffer.partition(b"\0")
        return message
