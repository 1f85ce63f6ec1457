"""A Hugging Face hub on 127.0.0.1 for tests: one data set repository, and what can go wrong.

Speaks as much of the protocol as huggingface_hub needs: `HEAD` and `GET` of
`/datasets/REPO/resolve/REVISION/NAME` are redirected, with X-Repo-Commit, X-Linked-Size and
X-Linked-ETag (sha256), to a second server, the CDN, which serves bytes and ranges. So a redirect
to another origin is what it is in the world.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, Self

COMMIT = "c0ffee" * 6 + "c0ff"
STALL_S = 20.0  # longest that a stalled answer is held, should nobody close it


class Fault(NamedTuple):
    """What one answer does wrong."""

    status: int = 0  # answer with this status instead
    retry_after: str = ""  # with that Retry-After
    after: int = -1  # bytes of the body before the connection is cut
    stall: bool = False  # ... or before nothing more comes
    body: bytes | None = None  # give this body, with its own length, instead
    no_ranges: bool = False  # give the whole file whatever Range asks for


class Request(NamedTuple):
    """What a client asked for."""

    method: str
    server: str  # hub or cdn
    name: str
    range: str  # "" for the whole file
    token: bool  # it came with an Authorization header


@dataclass
class FakeHub:
    """`with FakeHub(repo, {name: bytes}) as hub:` serves at `hub.endpoint`."""

    repo: str
    files: dict[str, bytes]
    requests: list[Request] = field(default_factory=list)
    hub_faults: deque[Fault] = field(default_factory=deque)  # for the next requests of the hub
    cdn_faults: deque[Fault] = field(default_factory=deque)  # ... of the CDN
    sent: int = 0  # bytes of bodies

    def __enter__(self) -> Self:
        self.closing = threading.Event()
        self.servers = []
        for server in ("hub", "cdn"):
            handler = type("Handler", (_Handler,), {"fake": self, "server_name": server})
            self.servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.endpoint, self.cdn = (f"http://127.0.0.1:{s.server_port}" for s in self.servers)
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def asked(self, method: str, server: str) -> list[Request]:
        """The requests of one kind, in order."""
        return [r for r in self.requests if (r.method, r.server) == (method, server)]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    server_name: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        name = self.path.rpartition("/")[2]
        asked = self.headers.get("Range", "")
        token = "Authorization" in self.headers
        self.fake.requests.append(Request(self.command, self.server_name, name, asked, token))
        faults = self.fake.hub_faults if self.server_name == "hub" else self.fake.cdn_faults
        fault = faults.popleft() if faults else Fault()
        if fault.status:
            self.head(fault.status, 0, {"Retry-After": fault.retry_after})
        elif self.server_name == "cdn":
            self.give(self.fake.files[name], asked, fault)
        elif self.path.startswith(f"/datasets/{self.fake.repo}/resolve/") and (
            name in self.fake.files
        ):
            self.redirect(name)
        else:
            self.head(404, 0, {"X-Error-Code": "EntryNotFound"})

    def redirect(self, name: str) -> None:
        data = self.fake.files[name]
        digest = hashlib.sha256(data).hexdigest()
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{digest}"',
            "Location": f"{self.fake.cdn}/{name}",
        }
        self.head(302, 0, headers)

    def give(self, data: bytes, asked: str, fault: Fault) -> None:
        start = 0 if fault.no_ranges or not asked else int(asked[len("bytes=") :].rstrip("-"))
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        body = data[start:] if fault.body is None else fault.body
        self.head(206 if start else 200, len(body), headers)
        if self.command == "HEAD":
            return
        body = body if fault.after < 0 else body[: fault.after]
        self.wfile.write(body)
        self.wfile.flush()
        self.fake.sent += len(body)
        if fault.stall:
            self.fake.closing.wait(STALL_S)
        self.close_connection = fault.after >= 0

    def head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
