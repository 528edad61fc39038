"""A real headless Chromium that opens pages from disk and tells, over its DevTools, what a person would see."""

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 60  # that a page may take
LOOK = """Promise.all([...document.images].map(image => image.decode().catch(() => null))).then(() => ({
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


def visit(pages: Sequence[tuple[Path, str]], folder: Path) -> list[Visit]:
    """Open pages, each in a colour scheme (`light` or `dark`).

    Args:
        folder: an empty place for the browser's own files.
    """
    return asyncio.run(asyncio.wait_for(_visit_all(pages, folder), SECONDS * len(pages)))


async def _visit_all(pages: Sequence[tuple[Path, str]], folder: Path) -> list[Visit]:
    import aiohttp

    assert CHROMIUM, "there is a browser"
    words = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
    )
    process = await asyncio.create_subprocess_exec(CHROMIUM, *words, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        address = ""
        while "DevTools listening on " not in address:
            line = await process.stderr.readline()
            assert line, "the browser did not start"
            address = line.decode()
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(address.split(" on ")[1].strip(), max_msg_size=0) as socket,
        ):
            return [await _Tab(socket).visit(path, scheme) for path, scheme in pages]
    finally:
        process.kill()
        await process.wait()


class _Tab:
    """Speaks with the DevTools."""

    def __init__(self, socket: Any):
        self._socket, self._sent, self._session = socket, 0, {}
        self._visit, self._loaded = Visit(), False

    async def visit(self, path: Path, scheme: str) -> Visit:
        target = await self._call("Target.createTarget", url="about:blank")
        attached = await self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._call(f"{domain}.enable")
        await self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await self._call("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._hear(await self._socket.receive_json())
        seen = await self._call("Runtime.evaluate", expression=LOOK, awaitPromise=True, returnByValue=True)
        vars(self._visit).update(seen["result"]["value"])
        return self._visit

    async def _call(self, method: str, **parameters: Any) -> dict:
        self._sent += 1
        number = id(self) % 1_000_000 * 1000 + self._sent
        await self._socket.send_json({"id": number, "method": method, "params": parameters, **self._session})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "result" in message, message
                return message["result"]
            self._hear(message)

    def _hear(self, message: dict) -> None:
        kind, told = message.get("method"), message.get("params", {})
        if kind == "Page.loadEventFired":
            self._loaded = True
        elif kind == "Network.requestWillBeSent" and not told["request"]["url"].startswith("data:"):
            self._visit.requests.append(told["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            self._visit.complaints.append(told["exceptionDetails"]["text"])
        elif kind == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self._visit.complaints.append(str(told["args"]))
        elif kind == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self._visit.complaints.append(told["entry"]["text"])
