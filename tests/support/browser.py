"""A real headless Chromium, driven by playwright, and what a person would see of its pages."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_BROWSER = (
    "there is no chromium, chromium-browser or google-chrome"
    if CHROMIUM is None
    else ""
    if find_spec("playwright")
    else "playwright is not installed"
)
TIMEOUT_MS = 30_000
LOOK = """() => Promise.all([...document.images].map(image => image.decode().catch(() => null))).then(() => ({
    images: [...document.images].map(image => ({width: image.naturalWidth, alt: image.alt})),
    ground: getComputedStyle(document.body).backgroundColor, title: document.title,
    overflow: document.documentElement.scrollWidth > innerWidth}))"""


@dataclass
class Visit:
    """A page as it was after loading."""

    title: str = ""
    ground: str = ""  # the page's colour
    overflow: bool = False  # whether it is wider than the window
    images: list[dict[str, Any]] = field(default_factory=list)  # `width` in pixels, 0 if it did not load, and `alt`
    complaints: list[str] = field(default_factory=list)  # errors and warnings on the console
    requests: list[str] = field(default_factory=list)  # all addresses asked for, apart from data within the page


@contextmanager
def open_browser() -> Iterator["Browser"]:
    """Start the browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def open_page(browser: "Browser", address: str, scheme: str = "light", width: int = 1200) -> tuple["Page", Visit]:
    """Open a page in a window of a width and a colour scheme; the Visit goes on collecting complaints and requests."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})  # pyright: ignore
    page.set_default_timeout(TIMEOUT_MS)
    seen = Visit()

    def hear(message: Any) -> None:
        if message.type in ("error", "warning", "assert"):
            seen.complaints.append(message.text)

    def count(request: Any) -> None:
        if not request.url.startswith("data:"):
            seen.requests.append(request.url)

    page.on("console", hear)
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("request", count)
    page.goto(address)
    return page, seen


def look(page: "Page", seen: Visit) -> Visit:
    """Complete a Visit by what the page shows now."""
    vars(seen).update(page.evaluate(LOOK))
    return seen


def visit(pages: Sequence[tuple[Path, str]], folder: Path | None = None) -> list[Visit]:
    """Open pages from disk, each in a colour scheme (`light` or `dark`)."""
    with open_browser() as browser:
        return [look(*open_page(browser, path.as_uri(), scheme)) for path, scheme in pages]
