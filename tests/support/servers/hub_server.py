"""A stand-in for the Hugging Face hub: the endpoints that an upload uses, over HTTP, with what arrives in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN, READ_TOKEN = "hf_write", "hf_read"
LFS_SUFFIXES = (".safetensors", ".png")


class Hub(ThreadingHTTPServer):
    """The state of the stand-in: repositories, large files, and what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.uploads = 0  # of large files
        self.refuses_uploads = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append(f"GET {self.path}")
        if self.path != "/api/whoami-v2":
            self.answer(404, {"error": "not found"})
        elif self.token in (TOKEN, READ_TOKEN):
            role = "write" if self.token == TOKEN else "read"
            user = {"name": "me", "orgs": [{"name": "club"}], "auth": {"accessToken": {"role": role}}}
            self.answer(200, user)
        else:
            self.answer(401, {"error": "Invalid user token."})

    def do_PUT(self) -> None:
        """A large file, named by its hash."""
        content = self.read()
        oid = self.path.rpartition("/")[2]
        self.server.requests.append("PUT")
        if self.server.refuses_uploads:
            self.answer(403, {"error": "no space left for you"})
        elif hashlib.sha256(content).hexdigest() != oid:
            self.answer(400, {"error": "wrong content"})
        else:
            self.server.blobs[oid] = content
            self.server.uploads += 1
            self.answer(200, {})

    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        content = self.read()
        if self.token != TOKEN:
            self.answer(401, {"error": "Invalid user token."})
        elif self.path == "/api/repos/create":
            self.create(json.loads(content))
        elif self.path == "/api/validate-yaml":
            text = json.loads(content)["content"]
            found = yaml.safe_load(text.split("---")[1]) if text.startswith("---\n") else {}
            errors = [] if isinstance(found, dict) and found.get("license") != "" else [{"message": "no metadata"}]
            self.answer(200, {"errors": errors, "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            self.answer(*self.sort_files(match[1], json.loads(content)))
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self.answer(200, {"transfer": "basic", "objects": [*self.plan(json.loads(content)["objects"])]})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            self.commit(match[1], [json.loads(line) for line in content.splitlines()])
        else:
            self.answer(404, {"error": "not found"})

    def create(self, wanted: dict) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        status = 409 if name in self.server.repos else 200
        self.server.repos.setdefault(name, {})
        self.server.private.setdefault(name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self.answer(status, {"url": f"{self.server.address}/{name}"})

    def sort_files(self, name: str, wanted: dict) -> tuple[int, dict]:
        if name not in self.server.repos:
            return 404, {"error": "Repository not found"}
        modes = {file["path"]: "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular" for file in wanted["files"]}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        return 200, {"files": files}

    def plan(self, objects: list[dict]) -> Iterator[dict]:
        for wanted in objects:
            action = {"upload": {"href": f"{self.server.address}/upload/{wanted['oid']}"}}
            yield wanted if wanted["oid"] in self.server.blobs else {**wanted, "actions": action}

    def commit(self, name: str, lines: list[dict]) -> None:
        repo = self.server.repos[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo[value["path"]] = self.server.blobs[value["oid"]]
        self.answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1" * 40})

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a stand-in until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
