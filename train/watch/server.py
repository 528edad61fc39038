"""The server's answers: the page, the numbers of runs as JSON, generated images, and requests to running jobs."""

import io
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from anyio import CapacityLimiter, to_thread
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from sdxl_trainer.configs.language.pages import write_page_texts
from sdxl_trainer.configs.language.translate import get_language, translate
from sdxl_trainer.train.watch.library import RunLibrary
from sdxl_trainer.train.watch.run_folder import MAX_IMAGE_PIXELS, describe_file, locate_image, read_image
from sdxl_trainer.train.watch.run_reader import REQUESTS, RunReader

PAGE = Path(__file__).with_name("page")
KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
TOKEN_MARK, TEXTS_MARK = "WATCH-TOKEN", "WATCH-TEXTS"  # in index.html
MAX_BODY_BYTES = 4096
THUMBNAIL_PX = 256  # longer side
DECODERS = 2  # images that are read at the same time
MAX_THUMBNAILS = 1000  # in memory, about 10 kB each


def build_app(root: Path, token: str) -> Starlette:
    """Build the application that shows the runs in a folder. It permits every request; see gate.py.

    Args:
        token: written into the page, which sends it with requests to running jobs.
    """
    views = Views(RunLibrary(root))
    page = (PAGE / "index.html").read_text("utf-8").replace(TOKEN_MARK, token)
    page = page.replace('lang="en"', f'lang="{get_language()}"').replace(
        TEXTS_MARK, write_page_texts("train/watch/page/")
    )
    static = {file.name: (file.read_bytes(), KINDS[file.suffix]) for file in PAGE.iterdir() if file.suffix in KINDS}

    def show_page(request: Request) -> Response:
        return Response(page, media_type="text/html; charset=utf-8")

    def show_static(request: Request) -> Response:
        content, kind = static.get(request.path_params["name"], (None, ""))
        return _say("no such file", 404) if content is None else Response(content, media_type=kind)

    routes = [
        Route("/", show_page),
        Route("/static/{name}", show_static),
        Route("/api/runs", views.list_runs),
        Route("/api/curves", views.for_run(_read_curves)),
        Route("/api/images", views.for_run(lambda reader, request: reader.read_images())),
        Route("/api/settings", views.for_run(lambda reader, request: reader.read_settings())),
        Route("/api/messages", views.for_run(lambda reader, request: reader.read_messages())),
        Route("/image", views.show_image),
        Route("/api/request", views.take_request, methods=["POST"]),
    ]
    return Starlette(routes=routes)


class Views:
    """Answers about the runs of a library. All but images are made on the server's one thread, so nothing is locked."""

    def __init__(self, library: RunLibrary):
        self._library = library
        self._thumbnails: OrderedDict[Any, bytes] = OrderedDict()
        self._limiter = CapacityLimiter(DECODERS)

    async def list_runs(self, request: Request) -> Response:
        """Answer with all runs."""
        return _send_json({"root": str(self._library.root), "runs": self._library.list_runs()})

    def for_run(self, read: Callable[[RunReader, Request], Any]) -> Callable:
        """Return a view that answers with what `read` returns for the run of the request."""

        async def view(request: Request) -> Response:
            reader = self._library.open_run(request.query_params.get("run", ""))
            return _say("no such run", 404) if reader is None else _send_json(read(reader, request))

        return view

    async def show_image(self, request: Request) -> Response:
        """Answer with a generated image, or with a thumbnail of it."""
        words = request.query_params
        reader = self._library.open_run(words.get("run", ""))
        step, number = (parse_number(words.get(name)) for name in ("step", "number"))
        if reader is None or step is None or number is None:
            return _say("no such image", 404)
        try:
            path = locate_image(reader.folder, step, number)
            version = describe_file(path)
            tag = f'"{version[1]:x}-{version[2]:x}{"-t" if "thumb" in words else ""}"' if version else ""
            headers = {"etag": tag, "cache-control": "private, no-cache"}
            if version and request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers=headers)
            # Decoded on another thread, so that other answers need not wait, and few at a time beside training.
            read, kind = (self._read_thumbnail, "image/webp") if "thumb" in words else (read_image, "image/png")
            content = await to_thread.run_sync(read, path, limiter=self._limiter)
            return Response(content, media_type=kind, headers=headers)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return _say("this image cannot be read", 404)

    async def take_request(self, request: Request) -> Response:
        """Write the file by which a running job is asked to save, to generate images, or to stop."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                return _say("the request is too long", 413)
        try:
            words = orjson.loads(body)
            run, name = words["run"], words["request"]
        except (ValueError, TypeError, KeyError):
            return _say("the request is no JSON with `run` and `request`", 400)
        reader = self._library.open_run(run) if isinstance(run, str) else None
        if reader is None or name not in REQUESTS:
            return _say("no such run or request", 404)
        if name not in reader.summarize()["accepts"]:
            return _say("this run is not running, is still starting, or has no prompts", 409)
        try:
            # A file that a link names is not touched.
            os.close(os.open(reader.folder / name, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o644))
        except OSError as error:
            return _say(f"{name} cannot be written: {error.strerror}", 409)
        return _send_json({"written": name})

    def _read_thumbnail(self, path: Path) -> bytes:
        key = (path, describe_file(path))
        thumbnail = self._thumbnails.get(key)
        if thumbnail is None:
            thumbnail = self._thumbnails[key] = make_thumbnail(read_image(path))
            if len(self._thumbnails) > MAX_THUMBNAILS:
                self._thumbnails.popitem(last=False)
        return thumbnail


def make_thumbnail(content: bytes) -> bytes:
    """Return a small WebP of a PNG.

    Raises:
        OSError, ValueError, SyntaxError: the image is damaged.
        ValueError: it is too large.
    """
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ValueError("is too large")
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), reducing_gap=2)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "WEBP", quality=80, method=2)
    return buffer.getvalue()


def parse_number(text: str | None) -> int | None:
    """Return a whole number of at most 12 digits; None for anything else."""
    return int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) <= 12 else None


def _read_curves(reader: RunReader, request: Request) -> dict[str, Any]:
    words = request.query_params
    return reader.read_curves(words.get("version", ""), parse_number(words.get("first")) or 0)


def _send_json(content: Any) -> Response:
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def _say(text: str, status: int) -> Response:
    return PlainTextResponse(translate(text), status)
