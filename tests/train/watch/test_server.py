"""The server over real HTTP: who may read, who may ask a run to stop, and which files are served."""

import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from programs import ROOT

from sdxl_trainer.train.watch import program
from sdxl_trainer.train.watch.gate import find_loopback_user

TOKEN = "a-token-of-the-test"
HEADER = {"X-Watch-Token": TOKEN}
NOBODY = 65534  # a user without rights


def ask(address: str, path: str, method: str = "GET", body: object = None, **headers: str) -> tuple[int, dict, bytes]:
    """Return status, headers and content of an answer; `headers` may replace `Host`."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers)
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    if content:
        connection.putheader("Content-Length", str(len(content)))
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(content)
    answer = connection.getresponse()
    result = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return result


def test_the_page_and_its_files_and_nothing_else(tmp_path: Path, write_run, serve) -> None:
    run = write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "elsewhere")
    (run / "samples" / "step-00000030").mkdir()
    (run / "samples" / "step-00000030" / "000.png").symlink_to(tmp_path / "elsewhere/samples/step-00000010/000.png")
    (run / "samples" / "step-00000040").mkdir()
    (run / "samples" / "step-00000040" / "000.png").write_text("no image")
    huge = run / "samples" / "step-00000050" / "000.png"
    huge.parent.mkdir()
    huge.touch()
    with open(huge, "r+b") as file:
        file.truncate(1 << 40)
    with serve(tmp_path / "runs") as address:
        status, headers, page = ask(address, "/")
        assert status == 200 and TOKEN.encode() in page and b"WATCH-TOKEN" not in page
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        status, headers, script = ask(address, "/static/app.js")
        assert status == 200 and headers["content-type"].startswith("text/javascript") and b"innerHTML" not in script
        names = [run["name"] for run in json.loads(ask(address, "/api/runs")[2])["runs"]]
        assert names == ["a"]
        status, headers, image = ask(address, "/image?run=a&step=10&number=0")
        assert status == 200 and headers["content-type"] == "image/png" and image.startswith(b"\x89PNG")
        assert ask(address, "/image?run=a&step=10&number=0", If_None_Match=headers["etag"])[0] == 304
        status, headers, image = ask(address, "/image?run=a&step=10&number=0&thumb=1")
        assert status == 200 and headers["content-type"] == "image/webp" and image[8:12] == b"WEBP"
        for path in (
            *(f"/image?run=a&step={step}&number=0" for step in (30, 40, 50, 60, "..", "10/../..")),
            *(f"/image?run=a&step={step}&number=0&thumb=1" for step in (30, 40, 50)),
            "/image?run=../elsewhere&step=10&number=0",
            "/image?run=..&step=10&number=0",
            "/api/settings?run=../elsewhere",
            "/api/settings?run=/etc",
            "/api/curves",
            "/static/..%2fserver.py",
            "/static/index.html",
            "/static/../program.py",
            "/logs/train.log",
        ):
            assert ask(address, path)[0] == 404, path


def test_only_the_own_page_may_ask_on_loopback_too(tmp_path: Path, write_run, serve) -> None:
    run = write_run(tmp_path / "a")
    with serve(tmp_path) as address:
        port = urlsplit(address).port
        for host in ("localhost:9999", "127.0.0.1", f"[::1]:{port}", "GPU.example.", "LOCALHOST"):
            assert ask(address, "/api/runs", Host=host)[0] == 200, host
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "192.168.1.2",
            "localhost@evil",
            "",
            "[::1",
            "localhost.evil",
        ):
            assert ask(address, "/api/runs", Host=host)[0] in (400, 421), host
        same = f"localhost:{port}"
        for origin in ("http://evil.example", "null", f"http://localhost:{(port or 0) + 1}", "http://["):
            assert ask(address, "/api/runs", Host=same, Origin=origin)[0] == 403, origin
        assert ask(address, "/api/runs", Sec_Fetch_Site="cross-site")[0] == 403
        assert ask(address, "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
        wish = {"run": "a", "request": "save"}
        for headers in ({}, {"X-Watch-Token": "wrong"}, {"X-Watch-Token": "\xe9"}, {"Cookie": f"watch-test={TOKEN}"}):
            assert ask(address, "/api/request", "POST", wish, **headers)[0] == 403, headers
        assert ask(address, "/api/request", "POST", wish, Origin="http://evil.example", **HEADER)[0] == 403
        assert ask(address, "/api/request", "POST", wish, Host="evil.example", **HEADER)[0] == 421
        assert ask(address, "/api/request", "PUT", wish, **HEADER)[0] == 405
        assert not (run / "save").exists()


def test_another_user_of_this_machine_is_refused_on_loopback(tmp_path: Path, write_run, serve) -> None:
    write_run(tmp_path / "a")
    with serve(tmp_path) as address:
        place = urlsplit(address)
        with socket.create_connection((place.hostname, place.port)) as own:
            assert find_loopback_user(*own.getsockname()) == os.getuid()
        assert find_loopback_user("127.0.0.1", 1) is None
        if os.getuid() != 0:
            pytest.skip("only root can ask as another user")
        asking = "import sys, http.client as h; c = h.HTTPConnection(sys.argv[1]); c.request('GET', '/'); "
        command = ["/usr/bin/python3", "-c", f"{asking}print(c.getresponse().status)", place.netloc]
        assert [subprocess.check_output(command, user=user, text=True) for user in (0, NOBODY)] == ["200\n", "403\n"]


def test_requests_write_their_files_and_no_others(tmp_path: Path, write_run, serve) -> None:
    run, target = write_run(tmp_path / "runs" / "a"), tmp_path / "target"
    write_run(tmp_path / "runs" / "over", state="stopped")
    write_run(tmp_path / "runs" / "silent", has_prompts=False)
    with serve(tmp_path / "runs") as address:
        origin = {"Origin": address, "Host": urlsplit(address).netloc, **HEADER}
        for name in ("save", "sample"):
            assert ask(address, "/api/request", "POST", {"run": "a", "request": name}, **origin)[0] == 200
            assert (run / name).read_bytes() == b""
        assert json.loads(ask(address, "/api/runs")[2])["runs"][0]["requests"] == ["save", "sample"]
        (run / "stop").symlink_to(target)
        status, _, reason = ask(address, "/api/request", "POST", {"run": "a", "request": "stop"}, **HEADER)
        assert status == 409 and b"stop cannot be written" in reason and not target.exists()
        for wish, expected in (
            ({"run": "a", "request": "config.yaml"}, 404),
            ({"run": "a", "request": "../x"}, 404),
            ({"run": "..", "request": "stop"}, 404),
            ({"run": ["a"], "request": "stop"}, 404),
            ({"run": "over", "request": "stop"}, 409),
            ({"run": "silent", "request": "sample"}, 409),
            ({"run": "a"}, 400),
            (b"[1]", 400),
            (b"{", 400),
            (b"x" * 9000, 413),
        ):
            assert ask(address, "/api/request", "POST", wish, **HEADER)[0] == expected, wish
        assert not (tmp_path / "runs" / "over" / "stop").exists()


def test_reading_from_another_host_needs_the_token(tmp_path: Path, write_run, serve) -> None:
    write_run(tmp_path / "a")
    with serve(tmp_path, is_local=False) as address:
        for path in ("/", "/static/app.js", "/api/runs", "/image?run=a&step=10&number=0", "/?token=wrong"):
            assert ask(address, path)[0] == 403, path
        assert ask(address, "/api/runs", Host="192.168.1.2:8765", **HEADER)[0] == 200
        assert ask(address, "/api/runs", Host="evil.example", **HEADER)[0] == 421
        status, headers, _ = ask(address, f"/?token={TOKEN}")
        assert (status, headers["location"]) == (303, "/")
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=lax" in cookie.lower()
        for path in ("/", "/static/app.js", "/api/runs", "/image?run=a&step=10&number=0"):
            assert ask(address, path, Cookie=cookie.partition(";")[0])[0] == 200, path


def test_an_image_bomb_is_not_decoded(tmp_path: Path, write_run, serve) -> None:
    samples = write_run(tmp_path / "a") / "samples"
    bomb, large = samples / "step-00000010" / "000.png", samples / "step-00000020" / "000.png"
    Image.new("1", (9000, 9000)).save(large)
    content = bytearray(bomb.read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)  # its width and height
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    bomb.write_bytes(content)
    with serve(tmp_path) as address:
        assert ask(address, "/image?run=a&step=10&number=0&thumb=1")[0] == 404
        assert ask(address, "/image?run=a&step=20&number=0&thumb=1")[0] == 404


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["no/such"], "no/such is not a folder"),
        (["--port", "70000"], "is not between 0 and 65535"),
        (["--host", "203.0.113.7"], "cannot listen on 203.0.113.7"),
        (["--host", "no such host"], "cannot listen on no such host"),
        (["--host", "a" * 70], "is no host name"),
    ],
)
def test_wrong_words_are_explained(tmp_path: Path, monkeypatch, capsys, words: list[str], expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    try:
        status = program.main(words)
    except SystemExit as error:
        status = error.code
    assert status == 2 and expected in capsys.readouterr().err


def test_the_script_serves_until_it_is_stopped(tmp_path: Path, write_run) -> None:
    write_run(tmp_path / "my runs" / "a")
    command = ["bash", ROOT / "launch/watch.sh", "my runs", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "watching my runs\n"
        address = server.stdout.readline().split()[1]
        port = urlsplit(address).port
        assert json.loads(ask(address.rstrip("/"), "/api/runs")[2])["runs"][0]["state"] == "running"
        words = ["my runs", "--port", str(port)]
        again = subprocess.run(["bash", ROOT / "launch/watch.sh", *words], cwd=tmp_path, capture_output=True, text=True)
        assert again.returncode == 2 and f"port {port} is taken" in again.stderr and "Traceback" not in again.stderr
        server.send_signal(2)
        _, printed = server.communicate(timeout=30)
    assert server.returncode == 0 and printed == ""


def test_the_program_imports_no_torch() -> None:
    code = "import sys, sdxl_trainer.train.watch.server; sys.exit(any(m in sys.modules for m in ('torch', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
