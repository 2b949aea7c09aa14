"""A headless Chromium, driven through its debugging pipe: enough to open a page, wait for what it shows, and look."""

import base64
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One page, spoken to in Chromium's DevTools protocol: JSON messages that end in a null byte."""

    def __init__(self, commands: int, replies: int) -> None:
        self._commands = commands
        self._replies = replies
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def open(self, link: str, width: int = 1600, height: int = 1200) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=link)

    def evaluate(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait_for(self, texts: set[str], seconds: float) -> set[str]:
        """Waits until all texts are in the page's DOM; returns those that are still missing in the end."""
        deadline = time.monotonic() + seconds
        missing = texts
        while missing and time.monotonic() < deadline:
            time.sleep(0.3)
            dom = self.evaluate("document.documentElement.outerHTML") or ""
            missing = {text for text in texts if text not in dom}
        return missing

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self._count:
                result: dict[str, Any] = reply["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._replies, 1 << 20)
            if not part:
                raise ConnectionError("Chromium is gone")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        reply: dict[str, Any] = json.loads(message)
        return reply


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Starts Chromium with a new profile, and ends it."""
    read_commands, write_commands = os.pipe()
    read_replies, write_replies = os.pipe()
    options = (
        f"--headless --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe --user-data-dir='{profile}'"
    )
    process = subprocess.Popen(
        ["bash", "-c", f"exec '{CHROMIUM}' {options} 3<&{read_commands} 4>&{write_replies}"],
        pass_fds=(read_commands, write_replies),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(read_commands)
    os.close(write_replies)
    try:
        yield Page(write_commands, read_replies)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(write_commands)
        os.close(read_replies)
