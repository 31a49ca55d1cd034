"""A server with the Hub's HTTP API on the loopback interface: repositories, LFS, commits, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


class Store:
    """The state of the server.

    Attributes:
        repos: Files of each repository.
        commits: Newest commit of each repository.
        private: Whether each repository is private.
        objects: LFS objects by SHA-256.
        requests: Every request, as `METHOD path`.
        uploaded: Bytes of LFS objects received since the last `reset`.
        received: The body of every request.
        dead_from: Number of the first request to fail: its connection is closed, and later ones get an error.
        refuse_token: Whether to answer 401 to every request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, str] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.received: list[bytes] = []
        self.lock = threading.Lock()
        self.refuse_token = False
        self.reset()

    def reset(self, dead_from: int | None = None) -> None:
        self.requests: list[str] = []
        self.uploaded = 0
        self.dead_from = dead_from

    def is_lfs(self, name: str) -> bool:
        return name.endswith((".safetensors", ".png", ".model"))

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> str:
        files = dict(self.repos[repo])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.repos[repo] = files
        content = repr(sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items()))
        self.commits[repo] = hashlib.sha1((self.commits[repo] + content).encode()).hexdigest()
        return self.commits[repo]


class Handler(BaseHTTPRequestHandler):
    store: Store
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.answer_request()

    def do_PUT(self) -> None:
        self.answer_request()

    def do_GET(self) -> None:
        self.answer_request()

    def do_HEAD(self) -> None:
        self.answer_request()

    def answer_request(self) -> None:
        store = self.store
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.read_chunks()
        path = unquote(self.path.split("?")[0])
        with store.lock:
            store.requests.append(f"{self.command} {path}")
            store.received.append(body)
            dead = store.dead_from is not None and len(store.requests) >= store.dead_from
            if dead and len(store.requests) == store.dead_from:
                self.close_connection = True
                self.connection.close()
                return
            if dead or store.refuse_token:
                self.reply(401 if store.refuse_token else 400, {"error": "no"})
                return
            self.route(path, body)

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def route(self, path: str, body: bytes) -> None:
        store = self.store
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            content = json.loads(body)
            repo = f"{content['organization']}/{content['name']}"
            store.repos[repo] = {".gitattributes": b"*.safetensors filter=lfs\n"}
            store.commits[repo] = hashlib.sha1(repo.encode()).hexdigest()
            store.private[repo] = content.get("private", content.get("visibility") == "private")
            self.reply(200, {"url": f"{self.endpoint}/{repo}", "name": repo})
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        elif parts[0] == "lfs":
            assert hashlib.sha256(body).hexdigest() == parts[1]
            store.objects[parts[1]] = body
            store.uploaded += len(body)
            self.reply(200, {})
        elif parts[:2] == ["api", "models"]:
            self.models("/".join(parts[2:4]), parts[4:], body)
        elif len(parts) > 3 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self.reply(404, {"error": path})

    def batch(self, content: dict[str, Any]) -> None:
        answers = []
        for item in content["objects"]:
            answer = dict(item)
            if item["oid"] not in self.store.objects:
                answer["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{item['oid']}", "header": {}}}
            answers.append(answer)
        self.reply(200, {"transfer": "basic", "objects": answers})

    def models(self, repo: str, rest: list[str], body: bytes) -> None:
        store = self.store
        if repo not in store.repos:
            self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["preupload"]:
            files = [self.mode(repo, item["path"]) for item in json.loads(body)["files"]]
            self.reply(200, {"files": files})
        elif rest[:1] == ["commit"]:
            oid = store.commit(repo, [json.loads(line) for line in body.splitlines()])
            self.reply(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo}/commit/{oid}"})
        elif rest[:1] == ["tree"]:
            inside = "".join(f"{part}/" for part in rest[2:])
            found = [self.entry(n, data) for n, data in store.repos[repo].items() if n.startswith(inside)]
            if inside and not found:
                self.reply(404, {"error": inside}, {"X-Error-Code": "EntryNotFound"})
            else:
                self.reply(200, found)
        else:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in store.repos[repo].items()]
            content = {"id": repo, "modelId": repo, "sha": store.commits[repo], "private": store.private[repo]}
            self.reply(200, content | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def mode(self, repo: str, name: str) -> dict[str, Any]:
        answer = {"path": name, "uploadMode": "lfs" if self.store.is_lfs(name) else "regular", "shouldIgnore": False}
        data = self.store.repos[repo].get(name)
        return answer if data is None else answer | {"oid": self.oid(name, data)}

    def oid(self, name: str, data: bytes) -> str:
        if self.store.is_lfs(name):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": self.oid(name, data)}
        if self.store.is_lfs(name):
            entry["lfs"] = {"oid": self.oid(name, data), "size": len(data), "pointerSize": 130}
        return entry

    def resolve(self, repo: str, name: str) -> None:
        data = self.store.repos.get(repo, {}).get(name)
        if data is None:
            code = "EntryNotFound" if repo in self.store.repos else "RepoNotFound"
            self.reply(404, {"error": name}, {"X-Error-Code": code})
            return
        headers = {"X-Repo-Commit": self.store.commits[repo], "ETag": f'"{self.oid(name, data)}"'}
        self.send(200, data, {"Content-Type": "application/octet-stream", **headers})

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]

    def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def serve() -> Iterator[tuple[Store, str]]:
    """Start a new server, and yield its state and endpoint."""
    store = Store()
    handler = type("OwnHandler", (Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield store, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
