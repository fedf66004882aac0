"""A read-only stand-in for the Hugging Face Hub on 127.0.0.1, for tests.

    python tests/hub_server.py ROOT

prints its address, serves models from ROOT/models/org/name and data sets from ROOT/datasets/org/name, and ends when its
stdin is closed. A folder name@branch beside name is a branch of it. A repository with an (empty) file .gated lists its
files but gives none out. Every request is a line of ROOT/requests.log: status, method, path.
"""

import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

GATE = ".gated"


class RefusedError(Exception):
    """Status and X-Error-Code of an answer that is none."""


class Repo:
    """One revision of a repository: a folder, its files by their path, its commit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gated = (folder / GATE).exists()
        self.files = {entry["path"]: folder / entry["path"] for entry in self.entries() if entry["type"] == "file"}
        self.commit = hashlib.sha1(json.dumps([folder.name, self.entries()]).encode()).hexdigest()

    def entries(self, subfolder: str = "", recursive: bool = True) -> list[dict[str, Any]]:
        """What the tree says of the files and folders in a folder of the repository."""
        found = []
        for path in sorted((self.folder / subfolder).glob("**/*" if recursive else "*")):
            entry = {"type": "directory", "path": path.relative_to(self.folder).as_posix(), "oid": "0" * 40, "size": 0}
            if path.is_file():
                entry |= {"type": "file", "oid": blob_id(path), "size": path.stat().st_size}
            if path.name != GATE:
                found.append(entry)
        return found


def blob_id(file: Path) -> str:
    """What git calls the content of a file."""
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def find_repo(root: Path, kind: str, name: str, revision: str) -> Repo:
    """A repository at a branch or commit."""
    folder = root / kind / name
    if not folder.is_dir():
        raise RefusedError(404, "RepoNotFound")
    branches = {"main": Repo(folder)}
    branches |= {path.name.partition("@")[2]: Repo(path) for path in folder.parent.glob(f"{folder.name}@*")}
    for branch, repo in branches.items():
        if revision in (branch, repo.commit):
            return repo
    raise RefusedError(404, "RevisionNotFound")


class Handler(BaseHTTPRequestHandler):
    """Routes a request to the method that answers it; more requests are more rows of `routes`."""

    protocol_version = "HTTP/1.1"
    root: ClassVar[Path]
    routes: ClassVar[list[tuple[str, str, str]]] = [
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", "tree"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", "paths_info"),
        ("GET HEAD", r"(?:/(datasets))?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    ]

    def info(self, kind: str, name: str, revision: str | None) -> None:
        repo = find_repo(self.root, kind, name, revision or "main")
        siblings = [{"rfilename": path} for path in repo.files]
        gated = "manual" if repo.gated else False
        facts = {"id": name, "sha": repo.commit, "siblings": siblings, "gated": gated, "private": False, "tags": []}
        self.send_json({**facts, "downloads": 0, "likes": 0})

    def tree(self, kind: str, name: str, revision: str, folder: str) -> None:
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = find_repo(self.root, kind, name, revision).entries(folder, recursive)
        if folder and not entries:
            raise RefusedError(404, "EntryNotFound")
        self.send_json(entries)

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        wanted = parse_qs(self.body.decode()).get("paths", [])
        entries = find_repo(self.root, kind, name, revision).entries()
        self.send_json([entry for entry in entries if entry["path"] in wanted])

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        repo = find_repo(self.root, kind or "models", name, revision)
        if repo.gated:
            raise RefusedError(403, "GatedRepo")
        if path not in repo.files:
            raise RefusedError(404, "EntryNotFound")
        data, status = repo.files[path].read_bytes(), 200
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{blob_id(repo.files[path])}"', "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(part[1]), min(int(part[2] or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        self.send(status, data, headers)

    def answer(self) -> None:
        """Answer a request of any method."""
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for methods, pattern, action in self.routes:
                if self.command in methods.split() and (match := re.fullmatch(pattern, url.path)):
                    return getattr(self, action)(*(unquote(g) if g else g for g in match.groups()))
            raise RefusedError(404, "NoSuchRoute")
        except RefusedError as refusal:
            status, code = refusal.args
            self.send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code})

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        with (self.root / "requests.log").open("a", encoding="utf-8") as log:
            log.write(f"{status} {self.command} {self.path}{' ' + headers['X-Error-Code'] if status >= 400 else ''}\n")
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...

    do_GET = do_HEAD = do_POST = answer  # noqa: N815, names that http.server looks for


def main(root: Path) -> None:
    """Serve a folder until stdin is closed."""
    Handler.root = root
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
