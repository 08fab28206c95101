"""A small local server that speaks the part of the Hugging Face hub's protocol that downloads need; counts requests."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>refs|revision|tree)(?:/(?P<revision>.+))?)?")
_LARGE = (".safetensors", ".bin")


@dataclass
class Repository:
    """Commits (name → files by path) and the branches that point at them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], *branches: str) -> str:
        """Add a commit and point the branches at it; returns its 40 hex digits."""
        content = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())})
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        for branch in branches:
            self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision)


@dataclass
class Hub:
    """The server's state: repositories, and what was asked and sent."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    downloads: list[tuple[str, str]] = field(default_factory=list)
    endpoint: str = ""
    times: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    """(commit, file) → when the body was begun and when it was sent (``time.monotonic``)."""
    portion: int = 1 << 20
    pause: float = 0.0
    """Seconds between two portions of a body."""
    refuse: Counter[str] = field(default_factory=Counter)
    """Commit → how many bodies of its weights are still refused with an error of the server."""
    silent: bool = False
    """Whether sizes are kept from listings."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def forget(self) -> None:
        """Start counting anew."""
        with self.lock:
            self.requests.clear()
            self.sent.clear()
            self.downloads.clear()


def files_of(folder: Path) -> dict[str, bytes]:
    """The files directly in a folder as a commit's content."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.sizes = "blobs=" in urlsplit(self.path).query and not self.hub.silent
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
        if found := _API.fullmatch(path):
            self._api(found["repo"], found["what"], found["revision"], body=body)
        elif found := _RESOLVE.fullmatch(path):
            self._file(found["repo"], found["revision"], found["file"], body=body)
        else:
            self._refuse("EntryNotFound", body=body)

    def _api(self, name: str, what: str | None, revision: str | None, *, body: bool) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._refuse("RepoNotFound", body=body)
        if what == "refs":
            listed = {
                kind: [{"name": ref, "ref": f"refs/{where}/{ref}", "targetCommit": sha} for ref, sha in refs.items()]
                for kind, where, refs in (
                    ("branches", "heads", repository.branches),
                    ("tags", "tags", repository.tags),
                )
            }
            return self._json({**listed, "converts": []}, body=body)
        sha = repository.resolve(revision or "main")
        if sha is None:
            return self._refuse("RevisionNotFound", body=body)
        files = repository.commits[sha]
        if what == "tree":
            return self._json([_tree_entry(path, data) for path, data in files.items()], body=body)
        siblings = [_sibling(path, data, sizes=self.sizes) for path, data in files.items()]
        return self._json({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": []}, body=body)

    def _file(self, name: str, revision: str, path: str, *, body: bool) -> None:
        repository = self.hub.repositories.get(name)
        sha = repository.resolve(revision) if repository else None
        if repository is None or sha is None:
            return self._refuse("RepoNotFound" if repository is None else "RevisionNotFound", body=body)
        data = repository.commits[sha].get(path)
        if data is None:
            return self._refuse("EntryNotFound", body=body)
        if body:
            with self.hub.lock:
                refused = path.endswith(_LARGE) and self.hub.refuse[sha] > 0
                if refused:
                    self.hub.refuse[sha] -= 1
                else:
                    self.hub.sent[path] += len(data)
                    self.hub.downloads.append((sha, path))
            if refused:
                return self._send(403, b"not now", {}, body=True)
        begun = time.monotonic()
        headers = {"ETag": f'"{_etag(path, data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        self._send(200, data, headers, body=body)
        if body:
            self.hub.times[sha, path] = (begun, time.monotonic())
        return None

    def _json(self, value: object, *, body: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body=body)

    def _refuse(self, code: str, *, body: bool) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": f"{code} (stub)"}
        self._send(401 if code == "RepoNotFound" else 404, b'{"error": "no"}', headers, body=body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        try:
            for start in range(0, len(data), self.hub.portion):
                self.wfile.write(data[start : start + self.hub.portion])
                if self.hub.pause and len(data) > self.hub.portion:
                    time.sleep(self.hub.pause)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client was killed or does not want it any more


def _etag(path: str, data: bytes) -> str:
    if path.endswith(_LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sibling(path: str, data: bytes, *, sizes: bool) -> dict[str, object]:
    entry: dict[str, object] = {"rfilename": path}
    if sizes:
        entry |= {"size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        if path.endswith(_LARGE):
            entry["lfs"] = {"sha256": _etag(path, data), "size": len(data), "pointerSize": 134}
    return entry


def _tree_entry(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": _etag(path, data)[:40]}
    if path.endswith(_LARGE):
        entry["lfs"] = {"oid": _etag(path, data), "size": len(data), "pointerSize": 134}
    return entry


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Run the server on a free local port for the length of the block."""
    hub = Hub(repositories)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
