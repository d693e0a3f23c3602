"""A headless Chromium, driven by its DevTools protocol over pipes.

    with open_browser() as page:
        page.open("file:///tmp/report.html")
        page.run("document.title")

Each message is a JSON object and a zero byte: to the browser on its descriptor 3, from it on 4.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-pipe", "about:blank",
)  # fmt: skip
START_S = ANSWER_S = 60


def browser_program():
    """The path of a Chromium; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        pytest.skip("no chromium here: .ci/install_chromium installs it")
    return found


@contextlib.contextmanager
def open_browser():
    """Start a browser with a profile of its own, yield its Page, and end it."""
    program = browser_program()
    to_browser, commands = os.pipe()  # (read end, write end)
    answers, from_browser = os.pipe()
    script = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = ["bash", "-c", script, program, f"--user-data-dir={profile}", *FLAGS]
        process = subprocess.Popen(
            words, pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield Page(commands, answers)
        finally:
            os.close(commands)  # at which the browser ends
            os.close(answers)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
            process.wait()


class Page:
    """A tab of a browser. commands, answers: descriptors of its pipes."""

    def __init__(self, commands, answers):
        self.commands, self.answers = commands, answers
        self.buffer, self.number, self.session = b"", 0, None
        self.errors, self.requests = [], []
        (target,) = [
            info for info in self.call("Target.getTargets")["targetInfos"] if info["type"] == "page"
        ]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """The result of a command of the protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next_message()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def next_message(self):
        while b"\0" not in self.buffer:
            chunk = os.read(self.answers, 1 << 20)
            assert chunk, "the browser has ended"
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message)
        return message

    def _note(self, event):
        """Remember what a sound page has none of: errors, and requests of other addresses."""
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", details).get("description", str(details)))
        if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, url):
        """Load a page, until its scripts have run."""
        self.errors.clear()
        self.requests.clear()
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def leave(self):
        """Go to an empty page, which ends the requests of this one."""
        self.call("Page.navigate", url="about:blank")
        self.wait_for("location.href === 'about:blank'")

    def run(self, expression):
        """The value of an expression of JavaScript."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression, patience_s=ANSWER_S):
        """Wait until an expression is true."""
        end = time.monotonic() + patience_s
        while not self.run(expression):
            assert time.monotonic() < end, f"{expression} did not become true"
            time.sleep(0.05)

    def show(self, width_px=1280, height_px=900, scheme="light", is_mobile=False):
        """Choose the size of the window and the color scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width_px, height=height_px,
            deviceScaleFactor=1, mobile=is_mobile,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path):
        """Write a PNG of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        with open(path, "wb") as file:
            file.write(base64.b64decode(answer["data"]))

    def click(self, selector):
        """Click what a CSS selector finds first."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")
