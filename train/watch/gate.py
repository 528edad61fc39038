"""Gate of the server: refuses requests that are not the page's own, and those without the token where it is needed.

Any website that is open in the same browser can send requests to this server, and one can even give its own name this
machine's address (DNS rebinding). So every request must name a host of this server, and come from a page of it. Other
users of this machine can reach a loopback address, too: the system reports whose connection it is.
"""

import ipaddress
import os
import secrets
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER = "x-watch-token"
TIME_WAIT = "06"  # state of a closed connection, whose socket has no owner any more
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Gate:
    """ASGI application that passes permitted requests on to another one.

    Args:
        token: secret of this start of the server.
        names: host names that requests may name, besides `localhost`.
        is_local: the server listens on a loopback address; reading then needs no token.
        cookie: name of the cookie that keeps the token in the browser.
    """

    def __init__(self, app: ASGIApp, token: str, names: Iterable[str], is_local: bool, cookie: str):
        self._app, self._token, self._is_local, self._cookie = app, token, is_local, cookie
        self._names = {name.lower().rstrip(".") for name in ("localhost", *names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            return  # there are no websockets

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        request = Request(scope)
        answer = self._refuse_other_user(scope) or self._refuse(request) or self._accept_token(request)
        await (answer or self._app)(scope, receive, send_with_headers)

    def _refuse_other_user(self, scope: Scope) -> Response | None:
        """Return the refusal of another user of this machine, whom a loopback address does not keep out."""
        user = find_loopback_user(*scope["client"]) if self._is_local and scope.get("client") else None
        if user in (None, 0, os.getuid()):  # root may read all files anyway
            return None
        return PlainTextResponse("this page belongs to another user of this machine", 403)

    def _refuse(self, request: Request) -> Response | None:
        """Return the refusal of a request that is not permitted."""
        if not self._is_own_host(request.headers.get("host", "")):
            return PlainTextResponse("this server does not have that name; see --allow-host", 421)
        if not _is_own_page(request):
            return PlainTextResponse("only this server's own page may ask", 403)
        if request.method == "POST":
            return None if self._is_token(request.headers.get(TOKEN_HEADER)) else _refuse_token()
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("this method is not used here", 405)
        given = (request.headers.get(TOKEN_HEADER), request.cookies.get(self._cookie), _get_address_token(request))
        return None if self._is_local or any(map(self._is_token, given)) else _refuse_token()

    def _accept_token(self, request: Request) -> Response | None:
        """Return an answer that moves the token from the address into a cookie; None if the address holds none."""
        if not self._is_token(_get_address_token(request)):
            return None
        answer = RedirectResponse("/", 303)
        # Not `strict`: the browser would leave the cookie out of the redirect when the address was clicked elsewhere.
        answer.set_cookie(self._cookie, self._token, httponly=True, samesite="lax")
        return answer

    def _is_token(self, given: str | None) -> bool:
        return given is not None and secrets.compare_digest(given.encode(), self._token.encode())

    def _is_own_host(self, host: str) -> bool:
        """Return whether the header `Host` names this server. The port may be that of a tunnel."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if any(mark in host for mark in "@/?#\\"):
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name.rstrip(".") in self._names
        # No website has a number as its name, so an address cannot be rebound.
        return address.is_loopback or not self._is_local


def find_loopback_user(host: str, port: int) -> int | None:
    """Return the number of the user who has opened a loopback connection from this address; None if unknown.

    Linux lists the owner of each socket in /proc/net/tcp (proc_net_tcp in the kernel's documentation). A tunnel of ssh
    belongs to the user who has logged in.
    """
    address = ipaddress.ip_address(host)
    packed = address.packed
    words = [
        packed[at : at + 4][::-1] if sys.byteorder == "little" else packed[at : at + 4]
        for at in range(0, len(packed), 4)
    ]
    wanted = f"{b''.join(words).hex()}:{port:04x}".upper()
    try:
        lines = Path("/proc/net/tcp6" if address.version == 6 else "/proc/net/tcp").read_text("ascii").splitlines()
    except OSError:  # another system
        return None
    rows = (line.split() for line in lines[1:])
    return next((int(row[7]) for row in rows if len(row) > 7 and row[1] == wanted and row[3] != TIME_WAIT), None)


def list_own_names(host: str, allowed: Iterable[str]) -> list[str]:
    """List the names by which this machine may be asked for."""
    return [host, socket.gethostname(), socket.getfqdn(), *allowed]


def _is_own_page(request: Request) -> bool:
    """Return whether a request comes from a page of this server, from its address bar, or from no browser."""
    origin = request.headers.get("origin")
    if origin is not None and _get_netloc(origin) != request.headers.get("host", "").lower():
        return False
    site = request.headers.get("sec-fetch-site", "none")
    is_opened = request.headers.get("sec-fetch-mode") == "navigate" and request.scope["path"] == "/"
    return site in ("same-origin", "none") or (is_opened and request.method == "GET")


def _get_netloc(origin: str) -> str | None:
    """Return host and port of an origin; None if it has none."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _get_address_token(request: Request) -> str | None:
    return request.query_params.get("token") if request.scope["path"] == "/" and request.method == "GET" else None


def _refuse_token() -> Response:
    return PlainTextResponse("the token is missing or old: open the address that the server printed", 403)
