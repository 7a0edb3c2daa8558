"""The real ComfyUI frontend in a headless Chromium, driven by Playwright.

Chromium comes from QT_CHROMIUM, from the system (`apt install chromium`), or from `playwright install chromium`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import urllib.parse
import urllib.request
from collections.abc import Collection
from pathlib import Path
from typing import Any

from . import needs
from .server import Server

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# This pack answers 404 for a checkpoint that is not there, and its pages take it for that.
OPTIONAL = "/api/quantized_transformers/describe"
# The page's spinner turns from before it registers nodes until its start graph is there, which takes the place of any
# graph loaded before it.
READY = ("(node) => node in (window.LiteGraph?.registered_node_types ?? {}) && window.app?.vueAppReady === true"
         " && window.app.extensionManager.spinner === false")
QUIET = 2  # seconds


def chromium() -> str | None:
    """The executable of an installed Chromium or Chrome, or None. Playwright itself must be installed."""
    if os.environ.get("QT_CHROMIUM"):
        return os.environ["QT_CHROMIUM"]
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found:
        return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).is_file() else None


def missing() -> str:
    """Why there is no browser to test with; empty when there is one."""
    if importlib.util.find_spec("playwright") is None:
        return "Playwright is not installed (pip install playwright)"
    if chromium() is None:
        return "there is no Chromium (apt install chromium, playwright install chromium, or name one in QT_CHROMIUM)"
    return ""


def require() -> None:
    """Skip the test without a browser; in CI, and where QT_REQUIRE_BROWSER is set, fail it."""
    if reason := missing():
        needs.missing(f"the browser tests need one, but {reason}", bool(os.environ.get("QT_REQUIRE_BROWSER")))


class Frontend:
    """`with Frontend(port) as frontend:` opens ComfyUI's page and waits until it has registered this pack's nodes.

    `problems` collects console errors, uncaught exceptions and failed requests, but for those that are `known`. Nothing
    but the server is reachable. `node` is another one to wait for.
    """

    def __init__(self, port: int, settings: dict[str, Any] | None = None, known: Collection[str] = (),
                 node: str = "QT_LoadBaseModel") -> None:
        self.port, self.known, self.node = port, known, node
        # without the first, a new user sees the template browser over the graph; the second is test_missing.py's
        self.settings = {"Comfy.TutorialCompleted": True, "QuantizedTransformers.OfferDownloads": False, **(settings or {})}
        self.problems: list[str] = []

    def __enter__(self) -> Frontend:
        from playwright.sync_api import sync_playwright

        self._set(self.settings)
        self._playwright = sync_playwright().start()
        try:
            self._browser = self._playwright.chromium.launch(executable_path=chromium(), args=[
                "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
                "--disable-background-networking", "--disable-component-update"])
            self.open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_browser"):
            self._browser.close()
        self._playwright.stop()

    def open(self, settings: dict[str, Any] | None = None, blocked: str = "") -> None:
        """Open the page, or another one that knows nothing of the one before and asks the server anew.

        `settings` are stored before; requests whose path begins with `blocked` fail.
        """
        if settings:
            self._set(settings)
        if hasattr(self, "page"):
            self.page.context.close()
        self.page = self._browser.new_page(viewport={"width": 1920, "height": 1080})

        def allowed(url: str) -> bool:
            return self._own(url) and not (blocked and urllib.parse.urlsplit(url).path.startswith(blocked))

        self.page.route("**/*", lambda route: route.continue_() if allowed(route.request.url) else route.abort())
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self._problem(f"uncaught: {error}"))
        self.page.goto(f"http://127.0.0.1:{self.port}/")
        self.page.wait_for_function(READY, arg=self.node, timeout=90_000)

    def _set(self, settings: dict[str, Any]) -> None:
        """Store user settings on the server."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/settings", json.dumps(settings).encode(),
                                         {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=30).close()

    def _own(self, url: str) -> bool:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("data", "blob") or parts.hostname == "127.0.0.1" and parts.port == self.port

    def _console(self, message: Any) -> None:
        url = message.location.get("url", "")
        if message.type != "error" or not self._own(url):
            return
        path = urllib.parse.urlsplit(url).path
        if not ("404" in message.text and path.startswith(OPTIONAL)):
            self._problem(f"{message.text} ({path})")

    def _problem(self, text: str) -> None:
        if text not in self.known:
            self.problems.append(text)

    def run(self, script: str, argument: Any = None) -> Any:
        """The value of a JavaScript function called in the page."""
        return self.page.evaluate(script, argument)

    def screenshot(self, path: Path) -> None:
        """The page as it is, as PNG."""
        self.page.screenshot(path=str(path))


def problems_of_the_host(base: Path) -> list[str]:
    """What the page of a ComfyUI without this pack complains of: files of a user who has none yet, models of its start
    graph that the server's policy keeps it from asking the Hub for, and whatever its next version will."""
    with Server(base, pack=False) as server, Frontend(server.port, node="KSampler") as frontend:
        before = -1
        while before != len(frontend.problems):
            before = len(frontend.problems)
            frontend.page.wait_for_timeout(1000 * QUIET)
        return frontend.problems
