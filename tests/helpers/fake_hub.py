"""A server on this machine that speaks what a push needs of the hub's protocol, and keeps what it was given."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """Repositories by name, and how the server behaves."""

    def __init__(self) -> None:
        self.status: int | None = None
        """Answer everything with this status"""
        self.hangs = threading.Event()
        """Once set, answer nothing until `released`"""
        self.released = threading.Event()
        self.failures = 0
        """Answer so many requests with 503 first"""
        self.made: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}
        """Contents of large files by their SHA-256"""
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.unknown: list[str] = []
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def _reply(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().strip(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _handle(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        body = self._body()
        hub.requests.append(f"{self.command} {path}")
        if hub.hangs.is_set():
            hub.released.wait(120)
            return
        if hub.status is not None or hub.failures:
            hub.failures -= bool(hub.failures)
            self._reply(hub.status or 503, {"error": "refused"})
            return
        if self.command == "PUT":
            hub.stored[path.rpartition("/")[2]] = body
            self._reply(200, {})
            return
        hub.tokens.add(self.headers.get("Authorization"))
        self._api(path, body)

    def _api(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization") or "someone", asked["name"]]))
            known = name in hub.made
            hub.made.setdefault(name, asked)
            self._reply(409 if known else 200, {"url": f"{hub.url}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self._reply(200, {"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in files]
            found = [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                for file, mode in zip(files, modes, strict=True)
            ]
            self._reply(200, {"files": found})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**one, "actions": {"upload": {"href": f"{hub.url}/upload/{one['oid']}"}}} for one in objects]
            self._reply(200, {"transfer": "basic", "objects": actions})
        elif path.endswith("/commit/main"):
            self._commit(path.split("/models/")[1].removesuffix("/commit/main"), body)
        elif self.command == "GET" and path.startswith("/api/models/"):
            self._reply(
                200, {"id": path.split("/models/")[1].partition("/revision")[0], "sha": "0" * 40, "siblings": []}
            )
        else:
            hub.unknown.append(path)
            self._reply(404, {"error": "unknown here"})

    def _commit(self, name: str, body: bytes) -> None:
        files = self.hub.files.setdefault(name, {})
        for line in filter(None, body.split(b"\n")):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        url = f"{self.hub.url}/{name}/commit/{'1' * 40}"
        self._reply(200, {"success": True, "commitUrl": url, "commitOid": "1" * 40, "hookOutput": ""})

    do_GET = do_POST = do_PUT = _handle

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """The server, at its `url`; for HF_ENDPOINT."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
