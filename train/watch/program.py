"""The program that shows runs in a browser: `python -m sdxl_trainer.train.watch [RUNS]`. Imports no torch."""

import errno
import ipaddress
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.launch.failures import explain_failure
from sdxl_trainer.launch.status import STATUS_DONE, STATUS_FAILED, STATUS_WRONG_INPUT

NICENESS = 10  # so that training has priority
DEFAULT_PORT = 8765
EXTRA_CURE = "the page needs two more packages: pip install starlette uvicorn"


def build_parser() -> TranslatedParser:
    """Build the parser of the program's arguments."""
    parser = TranslatedParser(
        prog="bash launch/watch.sh",
        description="Show all runs of a folder in your browser, while they train and afterwards: progress, charts, "
        "generated images, settings and warnings. It only reads a run's files; its buttons add a request file to the "
        "run folder.",
        examples=["%(prog)s", "%(prog)s /data/runs --port 9000"],
        epilog="All that the page shows, and how to reach it from another machine: docs/WATCH.md.",
    )
    parser.add_argument(
        "runs", nargs="?", type=parse_path, default=Path("runs"), help="folder of your runs, or one run (default: runs)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"port (default: {DEFAULT_PORT}; 0: any)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another host name that a browser may reach this machine by; may be repeated",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C, and return the exit status (0 done, 1 failed, 2 wrong input)."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not options.runs.is_dir():
        parser.error(f"{options.runs} is not a folder: name the folder of your runs, or start a run first")
    if not 0 <= options.port < 1 << 16:
        parser.error(f"--port {options.port} is not between 0 and 65535")
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        sys.stderr.write(f"{translate(EXTRA_CURE)}\n")
        return STATUS_WRONG_INPUT
    try:
        listener = open_listener(options.host, options.port)
    except OSError as error:
        sys.stderr.write(f"{translate(describe_listen_error(error, options.host, options.port))}\n")
        return STATUS_WRONG_INPUT
    os.nice(NICENESS)
    try:
        serve(listener, options.runs, options.host, options.allow_host)
    except OSError as error:
        sys.stderr.write(f"{translate(explain_failure(error) or str(error))}\n")
        return STATUS_FAILED
    return STATUS_DONE


def open_listener(host: str, port: int) -> socket.socket:
    """Listen on an address.

    Raises:
        OSError: the host is unknown, the port is taken, or this user may not listen on it.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:
        raise OSError(errno.EINVAL, f"is no host name ({error})") from None
    family, _, _, _, address = found[0]
    return socket.create_server(address[:2], family=family)


def describe_listen_error(error: OSError, host: str, port: int) -> str:
    """Return what is wrong with the address to listen on, and the cure."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken, perhaps by another page: choose another one, such as --port {port + 1}"
    if error.errno == errno.EACCES:
        return f"port {port} needs the rights of root: choose one above 1023, such as --port {DEFAULT_PORT}"
    return f"cannot listen on {host}: {error.strerror}; use an address of this machine, or 0.0.0.0 for all of them"


def serve(listener: socket.socket, runs: Path, host: str, allowed: Sequence[str]) -> None:
    """Serve the page of the runs in a folder until a stop signal."""
    import uvicorn

    from sdxl_trainer.train.watch.gate import Gate, list_own_names
    from sdxl_trainer.train.watch.server import build_app

    token, port = secrets.token_urlsafe(24), listener.getsockname()[1]
    is_local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    app = Gate(build_app(runs, token), token, list_own_names(host, allowed), is_local, f"sdxl-watch-{port}")
    sys.stdout.write(describe_address(runs, listener.getsockname()[0], port, None if is_local else token))
    sys.stdout.flush()
    config = uvicorn.Config(
        app, log_level="error", access_log=False, lifespan="off", ws="none", server_header=False, proxy_headers=False
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # uvicorn raises the signal again after a clean end


def describe_address(runs: Path, address: str, port: int, token: str | None) -> str:
    """Return the lines that name the page's address.

    Args:
        token: part of the address if reading needs it.
    """
    is_any = ipaddress.ip_address(address).is_unspecified
    host = socket.gethostname() if is_any else f"[{address}]" if ":" in address else address
    page = f"http://{host}:{port}/" + (f"?token={token}" if token else "")
    lines = [f"watching {runs}", f"open {page}    (Ctrl-C ends the page; runs continue)"]
    if token:
        lines.append("whoever has this address can see and stop your runs; the connection is not encrypted")
    elif "SSH_CONNECTION" in os.environ:
        tunnel = f"ssh -L {port}:localhost:{port} {socket.gethostname()}"
        lines.append(f"from your own computer: {tunnel}, then open the same address there")
    return "\n".join(map(translate, lines)) + "\n"
