"""An S3 server (moto) on loopback for tests, and a proxy before it that injects faults.

As a program, `python object_store.py --port-file FILE` serves both until it is ended, and writes their ports to FILE.
"""

import argparse
import http.client
import json
import os
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ACCESS = {
    "AWS_ACCESS_KEY_ID": "x",
    "AWS_SECRET_ACCESS_KEY": "y",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",  # this project's own retries are tried, not the library's
}
ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>{}</Message></Error>'
ANSWERS = {
    "internal": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow": (503, "SlowDown", "Please reduce your request rate."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "denied": (403, "AccessDenied", "Access Denied"),
}
# `reset` closes the connection before the request is passed on, `lost` after the server has done what it asks for.
FAULTS = ("internal", "slow", "expired", "reset", "lost")
HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "date", "server"}


class Request:
    """A request that the proxy received."""

    def __init__(self, method: str, path: str, headers: dict[str, str]):
        self.method, self.path, self.headers = method, path, headers

    def __repr__(self) -> str:
        return f"{self.method} {self.path}"


class FaultyStore:
    """A proxy before a server. `choose_fault` returns the fault of a request, or None; `requests` lists all requests.

    Attributes:
        ignores_ranges: the server's answers to ranged reads are whole objects.
    """

    def __init__(self, target_port: int, choose_fault: Callable[[Request], str | None] | None = None):
        self.choose_fault = choose_fault or (lambda request: None)
        self.requests: list[Request] = []
        self.ignores_ranges = False
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def handle_any(self) -> None:
                store.answer(self, target_port)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, target_port: int) -> None:
        if handler.headers.get("Expect", "").lower() == "100-continue":
            handler.send_response_only(100)
            handler.end_headers()
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        request = Request(handler.command, handler.path, dict(handler.headers))
        self.requests.append(request)
        fault = self.choose_fault(request)
        if fault == "reset":
            return _reset(handler)
        if fault in ANSWERS:
            status, code, message = ANSWERS[fault]
            return _send(handler, status, [("Content-Type", "application/xml")], ERROR.format(code, message).encode())
        headers = {
            name: value for name, value in request.headers.items() if name.lower() not in ("connection", "expect")
        }
        if self.ignores_ranges:
            headers.pop("Range", None)
        connection = http.client.HTTPConnection("127.0.0.1", target_port, timeout=60)
        try:
            connection.request(handler.command, handler.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        except OSError:
            return _reset(handler)
        finally:
            connection.close()
        if fault == "lost":
            return _reset(handler)
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in HOP_HEADERS]
        length = answer.headers.get("Content-Length") if handler.command == "HEAD" else str(len(content))
        return _send(handler, answer.status, kept, content, length)


def _send(
    handler: BaseHTTPRequestHandler,
    status: int,
    headers: list[tuple[str, str]],
    content: bytes,
    length: str | None = None,
) -> None:
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", length or str(len(content)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(content)


def _reset(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.connection.close()


def choose_randomly(rate: float, seed: int) -> Callable[[Request], str | None]:
    """Return a chooser that makes a share of the requests fail."""
    rng = random.Random(seed)
    return lambda request: rng.choice(FAULTS) if rng.random() < rate else None


@contextmanager
def serve_store() -> Iterator[FaultyStore]:
    """Run moto and a proxy before it, and set the variables that s3fs reads its address and credentials from."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = FaultyStore(server.get_host_and_port()[1])
    before = dict(os.environ)
    os.environ.update(ACCESS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.port}")
    try:
        yield proxy
    finally:
        os.environ.clear()
        os.environ.update(before)
        proxy.stop()
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with serve_store() as proxy:
        server_port = int(re.findall(r"\d+$", os.environ["AWS_ENDPOINT_URL"])[0])
        proxy.choose_fault = choose_randomly(options.rate, options.seed)
        options.port_file.write_text(json.dumps({"proxy": server_port}))
        while True:
            time.sleep(60)


if __name__ == "__main__":
    main()
