"""A server on 127.0.0.1 that answers as the Hugging Face hub does, for the client's real code: HF_ENDPOINT=its url.

It serves a folder: ``ROOT/datasets/OWNER/NAME/COMMIT/...`` and a file ``refs.json`` next to the commits that maps
branches and tags to them; the same under ``ROOT/models``. Endpoints and headers are those that huggingface_hub 1.x
requests (hf_api.py, file_download.py): repository info, tree, paths-info, resolve.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?$")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


def commit_of(content: str) -> str:
    return hashlib.sha1(content.encode()).hexdigest()


def add_revision(root: Path, repository: str, branch: str, files: dict[str, bytes]) -> str:
    """Put a commit with these files into ``datasets/OWNER/NAME``; the branch points to it. Returns the commit."""
    commit = commit_of(f"{branch}{sorted(files.items())}")
    for name, content in files.items():
        path = root / repository / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    refs = root / repository / "refs.json"
    known = json.loads(refs.read_text()) if refs.exists() else {}
    refs.write_text(json.dumps(known | {branch: commit}))
    return commit


class Hub(BaseHTTPRequestHandler):
    """One request. ``root`` and ``asked`` (the paths of all requests) are set by ``serve``."""

    root: Path
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.asked.append(unquote(self.path))
        url = urlsplit(self.path)
        if match := API.match(url.path):
            kind, name, what, revision, inner = match.groups()
            return self._api(f"{kind}/{name}", what, revision, inner, parse_qs(url.query))
        if match := RESOLVE.match(url.path):
            datasets, name, revision, inner = match.groups()
            return self._file(f"{'datasets' if datasets else 'models'}/{name}", revision, unquote(inner))
        return self._fail(404, "EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.asked.append(unquote(self.path))
        is_json = "json" in self.headers["Content-Type"]
        self.paths = json.loads(body)["paths"] if is_json else parse_qs(body)["paths"]
        kind, name, what, revision, inner = API.match(urlsplit(self.path).path).groups()
        self._api(f"{kind}/{name}", what, revision, inner, {})

    def log_message(self, *_: object) -> None:
        pass

    def _commit(self, repository: str, revision: str | None) -> str | None:
        refs = self.root / repository / "refs.json"
        if not refs.exists():
            self._fail(404, "RepoNotFound")
            return None
        known = json.loads(refs.read_text())
        revision = unquote(revision or "main")
        commit = known.get(revision, revision)
        if commit not in known.values():
            self._fail(404, "RevisionNotFound")
            return None
        return commit

    def _api(self, repository: str, what: str | None, revision: str | None, inner: str | None, query: dict) -> None:
        commit = self._commit(repository, revision)
        if commit is None:
            return None
        folder = self.root / repository / commit
        if what in (None, "revision"):
            siblings = [{"rfilename": str(f.relative_to(folder))} for f in sorted(folder.rglob("*")) if f.is_file()]
            name = repository.split("/", 1)[1]
            return self._json({"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False})
        if what == "paths-info":
            return self._json([entry(folder / p, folder) for p in self.paths if (folder / p).exists()])
        start = folder / unquote(inner or "")
        if not start.is_dir():
            return self._fail(404, "EntryNotFound")
        is_deep = query.get("recursive", ["false"])[0].lower() == "true"
        return self._json([entry(f, folder) for f in sorted(start.rglob("*") if is_deep else start.iterdir())])

    def _file(self, repository: str, revision: str, inner: str) -> None:
        commit = self._commit(repository, revision)
        if commit is None:
            return None
        file = self.root / repository / commit / inner
        if not file.is_file():
            return self._fail(404, "EntryNotFound", commit)
        content = file.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _fail(self, code: int, kind: str, commit: str | None = None) -> None:
        self._send(code, b"", {"X-Error-Code": kind} | ({"X-Repo-Commit": commit} if commit else {}))

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def entry(path: Path, folder: Path) -> dict:
    """A line of the tree."""
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": commit_of(name)}
    content = path.read_bytes()
    return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(address, list of requested paths) of a hub with this content."""
    handler = type("Handler", (Hub,), {"root": root, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()
