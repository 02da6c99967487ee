"""A headless Chromium for tests of pages: real widths, and every request that a page makes.

It is driven over a pair of pipes by the DevTools protocol, so that nothing else is needed; widths are
those of the device, not of a window, which cannot be as narrow as a telephone.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
]
FLAGS += ["--no-first-run", "--disable-extensions", "--disable-background-networking"]


class Browser:
    """One page in a browser; `with Browser(folder) as browser`, whose profile lies in the folder."""

    def __init__(self, folder):
        self.program = next(filter(None, map(shutil.which, NAMES)), None)
        if self.program is None:
            pytest.skip(f"none of {', '.join(NAMES)} is installed")
        self.profile, self.number, self.events = Path(folder) / "profile", 0, []

    def __enter__(self):
        from_test, self.writing = os.pipe()
        self.reading, to_test = os.pipe()
        command = [self.program, *FLAGS, "--remote-debugging-pipe"]
        command += [f"--user-data-dir={self.profile}", "about:blank"]
        # Chromium reads from 3 and writes to 4, whatever numbers the pipes have here.
        script = f'exec 3<&{from_test} 4>&{to_test}; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(from_test, to_test),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(from_test)
        os.close(to_test)
        self.stream = os.fdopen(self.reading, "rb")
        self.session = None
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(x["targetId"] for x in targets if x["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.stream.close()
        os.close(self.writing)

    def call(self, method, **parameters):
        """The result of a command; what happens meanwhile is kept in `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self):
        """The next message, which ends in a zero."""
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        text = bytearray()
        while not text.endswith(b"\0"):
            part = self.stream.read(1)
            assert part, "the browser has ended"
            text += part
        signal.alarm(0)
        return json.loads(text[:-1])

    def open(self, path, width, height=900, dark=False):
        """Open a file on a screen of so many pixels; the addresses of all that it asked for."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=Path(path).absolute().as_uri())
        while not any(x.get("method") == "Page.loadEventFired" for x in self.events):
            self.events.append(self._read())
        sent = [x for x in self.events if x.get("method") == "Network.requestWillBeSent"]
        return [x["params"]["request"]["url"] for x in sent]

    def evaluate(self, expression):
        """The value of an expression of JavaScript in the page."""
        said = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def complaints(self):
        """What the browser has logged of the page: errors and violations of its policy."""
        return [x["params"] for x in self.events if x.get("method") == "Log.entryAdded"]

    def picture(self, path):
        """Write the whole page as PNG."""
        said = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(said["data"]))


def _too_long(number, frame):
    raise TimeoutError(f"the browser has not answered in {SECONDS} s")
