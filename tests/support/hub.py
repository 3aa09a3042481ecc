"""Hugging Face's hub as a server on loopback: the part of its API that reading and writing repositories needs.

Paths, error codes and headers are those of huggingface_hub 2.4 and of the hub's answers to it.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_goodtoken"


@dataclass
class Repo:
    """A model or dataset; every revision is its one commit."""

    files: dict[str, bytes]
    licence: str = ""
    gated: bool = False
    private: bool = False
    commits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        content = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in sorted(self.files.items())})
        return hashlib.sha1(content.encode()).hexdigest()


@dataclass
class Hub:
    """The server's content, and what it was asked."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)  # by models/OWNER/NAME or datasets/OWNER/NAME
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)  # (method, path)
    refuses_commits: bool = False


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve a hub; its content may change meanwhile."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def connected(hub: Hub, monkeypatch: Any, cache: Path, token: str = "") -> Iterator[Hub]:
    """Point huggingface_hub at a hub, with a cache of its own."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        hub, parts = self.hub, urlsplit(self.path)
        path = unquote(parts.path).strip("/")
        hub.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given not in ("", TOKEN):
            return self.send(401, {"error": "Invalid credentials in Authorization header"})
        if path == "api/whoami-v2":
            return self.send(200 if given else 401, {"name": "ada", "type": "user", "orgs": []})
        if path == "api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if path == "api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'ada'}/{wanted['name']}"
            known = f"models/{name}" in hub.repos
            hub.repos.setdefault(f"models/{name}", Repo({}, private=wanted.get("visibility") == "private"))
            return self.send(409 if known else 200, {"url": f"{hub.url}/{name}", "name": name})
        if path.startswith("lfs/"):
            hub.blobs[path.removeprefix("lfs/")] = body
            return self.send(200, {})
        if found := re.fullmatch(r"([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in json.loads(body)["objects"]
            ]
            return self.send(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(.*))?", path):
            return self.about(f"{found[1]}/{found[2]}", found[3] or "", body, parts.query, given)
        if found := re.fullmatch(r"(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(f"{'datasets' if found[1] else 'models'}/{found[2]}", found[3], found[4], given)
        return self.send(404, {"error": path})

    def readable(self, key: str, given: str) -> Repo | None:
        """Return a repository, or answer why it cannot be read."""
        repo = self.hub.repos.get(key)
        if repo is None or (repo.private and not given):
            self.send(401 if not given else 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def about(self, key: str, rest: str, body: bytes, query: str, given: str) -> None:
        repo = self.readable(key, given)
        if repo is None:
            return None
        kind, _, revision = rest.partition("/")
        if kind in ("", "revision"):
            if not self.has_revision(repo, revision or "main"):
                return None
            siblings = [{"rfilename": name, "size": len(data)} for name, data in sorted(repo.files.items())]
            card = {"license": repo.licence} if repo.licence else {}
            about = {"id": key.split("/", 1)[1], "sha": repo.sha, "siblings": siblings, "cardData": card, "tags": []}
            return self.send(200, about | {"private": repo.private, "gated": "auto" if repo.gated else False})
        if kind == "auth-check":
            gate = {"X-Error-Code": "GatedRepo"}
            return self.send(403, {"error": "Access is restricted"}, gate) if repo.gated else self.send(200, {})
        if kind == "tree":
            revision, _, below = revision.partition("/")
            recursive = parse_qs(query).get("recursive", ["false"])[0].lower() == "true"
            return self.send(200, list(_entries(repo, below, recursive)))
        if kind == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", []) if body[:1] != b"{" else json.loads(body)["paths"]
            entries = {entry["path"]: entry for entry in _entries(repo, "", True)}
            return self.send(200, [entries[path] for path in wanted if path in entries])
        if kind == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self.send(200, {"files": [file | {"shouldIgnore": False} for file in files]})
        if kind == "commit":
            return self.commit(repo, key.split("/", 1)[1], [json.loads(line) for line in body.splitlines()])
        return self.send(404, {"error": rest})

    def commit(self, repo: Repo, name: str, lines: list[dict[str, Any]]) -> None:
        if self.hub.refuses_commits:
            return self.send(403, {"error": "Forbidden: your token may not write"})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.blobs[value["oid"]]
        repo.commits.append(lines[0]["value"])
        return self.send(
            200, {"commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha, "success": True}
        )

    def has_revision(self, repo: Repo, revision: str) -> bool:
        known = revision in ("main", "v1", repo.sha)
        if not known:
            self.send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return known

    def resolve(self, key: str, revision: str, name: str, given: str) -> None:
        repo = self.readable(key, given)
        if repo is None or not self.has_revision(repo, revision):
            return None
        if repo.gated:
            return self.send(403, {"error": "Access to it is restricted"}, {"X-Error-Code": "GatedRepo"})
        if name not in repo.files:
            return self.send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data, status, headers = repo.files[name], 200, {}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        tag = hashlib.sha256(repo.files[name]).hexdigest()
        headers |= {"ETag": f'"{tag}"', "X-Repo-Commit": repo.sha, "Accept-Ranges": "bytes"}
        return self.send(status, data, headers)

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        if isinstance(content, dict) and "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entries(repo: Repo, below: str, recursive: bool) -> Iterator[dict[str, Any]]:
    """Yield the files and folders under a folder."""
    folders = set()
    for name, data in sorted(repo.files.items()):
        inside = name.removeprefix(f"{below}/") if below else name
        if below and inside == name:
            continue
        steps = inside.split("/")[:-1]
        folders |= {
            "/".join(filter(None, [below, *steps[: i + 1]])) for i in range(len(steps) if recursive else 1) if steps
        }
        if recursive or not steps:
            yield {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    yield from ({"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in sorted(folders))
