"""A model hub on loopback: one repository, the few routes that a download needs."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


@dataclass
class FakeHub:
    """What it serves, and what it was asked."""

    files: dict[str, bytes]
    repo_id: str = "owner/model"
    refusal: tuple[int, str] | None = None  # status and error code for everything
    cut_at: int | None = None  # bytes of model.safetensors after which its connection ends, once
    stall_at: int | None = None  # bytes of model.safetensors after which nothing more comes
    token: str | None = None  # wanted with each request
    endpoint: str = ""
    stalled: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)
    sent: dict[str, int] = field(default_factory=dict)  # file name → bytes of its content that went out


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        hub, path = self.served, self.path.partition("?")[0]
        if hub.refusal is not None:
            self._refuse(*hub.refusal)
        elif hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._refuse(401, "RepoNotFound")
        elif match := re.fullmatch(f"/api/models/{hub.repo_id}/revision/(.+)", path):
            if match[1] in ("main", COMMIT):
                self._json({"id": hub.repo_id, "sha": COMMIT, "siblings": [self._sibling(name) for name in hub.files]})
            else:
                self._refuse(404, "RevisionNotFound")
        elif path == f"/api/models/{hub.repo_id}/tree/{COMMIT}":
            self._json([{"type": "file", "path": name, **self._blob(name)} for name in hub.files])
        elif match := re.fullmatch(f"/{hub.repo_id}/resolve/{COMMIT}/(.+)", path):
            self._file(match[1], with_body=with_body)
        else:
            self._refuse(404, "RepoNotFound")

    def _blob(self, name: str) -> dict[str, object]:
        content = self.served.files[name]
        return {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _sibling(self, name: str) -> dict[str, object]:
        return {"rfilename": name, "size": len(self.served.files[name])}

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, name: str, *, with_body: bool) -> None:
        hub, content = self.served, self.served.files[name]
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not with_body:
            return
        if name != "model.safetensors":
            self._send(name, content[start:])
        elif hub.stall_at is not None:
            self._send(name, content[start : hub.stall_at])
            hub.stalled.set()
            hub.closing.wait()
        elif hub.cut_at is not None:
            self._send(name, content[start : hub.cut_at])
            hub.cut_at = None
            self.close_connection = True
        else:
            self._send(name, content[start:])

    def _send(self, name: str, content: bytes) -> None:
        self.wfile.write(content)
        self.served.sent[name] = self.served.sent.get(name, 0) + len(content)
