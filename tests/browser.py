"""Pages in a real browser: headless Chromium, driven by playwright, with all it says and asks for written down."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


@dataclass
class Opened:
    """A page, and what came of it."""

    page: Any
    said: list[str] = field(default_factory=list)
    """Errors and lines of the console."""
    asked: list[str] = field(default_factory=list)
    """Addresses that were asked for."""


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips the test where Chromium or playwright is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Any, page: Path | str, **settings: Any) -> Iterator[Opened]:
    """A file or an address in a tab of its own; `settings` are those of playwright's `new_context`."""
    context = browser.new_context(**{"viewport": DESKTOP} | settings)
    found = Opened(context.new_page())
    found.page.set_default_timeout(120_000)
    found.page.on("console", lambda message: found.said.append(message.text))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.on("dialog", lambda dialog: (found.said.append(dialog.message), dialog.dismiss()))
    found.page.on("request", lambda request: found.asked.append(request.url))
    found.page.goto(page if isinstance(page, str) else page.as_uri())
    yield found
    context.close()
