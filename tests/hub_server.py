"""The Hugging Face hub imitated on this machine: what its own client asks to read and to write.

It keeps every commit in memory. Uploads go through its LFS protocol where the hub's would; a client
must know the token `TOKEN` to write.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

COMMIT = "0a" * 20
"""The commit of every repository at the start."""
TOKEN = "hf_of_a_test"
Files = dict[str, bytes]


@dataclasses.dataclass
class Repo:
    """Commits by their ids, in order, and the commit of each branch."""

    commits: dict[str, Files]
    branches: dict[str, str]
    messages: list[str] = dataclasses.field(default_factory=list)
    private: bool = False

    @classmethod
    def of(cls, files: Files) -> Repo:
        return cls({COMMIT: files}, {"main": COMMIT})


@dataclasses.dataclass
class Hub:
    """A running server: its repositories by id, and every request as "METHOD path"."""

    endpoint: str
    repos: dict[str, Repo]
    requests: list[str] = dataclasses.field(default_factory=list)
    uploads: Files = dataclasses.field(default_factory=dict)

    def run(self, code: str, cache: Path, *arguments: str, **environment: str) -> list[Any]:
        """The JSON lines that `code` prints in a process of its own: a client reads its address
        once. `cache` is the hub's local cache."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        clean |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=clean | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


@contextlib.contextmanager
def serve(models: dict[str, Files]) -> Iterator[Hub]:
    """Serves repositories with these files."""
    hub = Hub("", {name: Repo.of(files) for name, files in models.items()})
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None: ...

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content_Type"] = "application/json"
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def path_of(self) -> tuple[str, list[str]]:
        """(the repository's id, the rest of the path)."""
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        return "/".join(parts[:2]), [unquote(part) for part in parts[2:]]

    # Reading

    def do_GET(self) -> None:
        repo_id, rest = self.path_of()
        refused = {"org/private": (401, {}), "org/broken": (500, {})}
        refused["org/gated"] = (403, {"X_Error_Code": "GatedRepo"})
        if repo_id in refused:
            status, headers = refused[repo_id]
            return self.answer(status, **headers)
        if repo_id not in self.hub.repos:
            return self.answer(404, X_Error_Code="RepoNotFound")
        repo = self.hub.repos[repo_id]
        if rest[:1] == ["resolve"] or rest[:1] == ["tree"] or rest[:1] == ["revision"]:
            asked = rest[1]
        else:
            asked = "main"
        commit = repo.branches.get(asked, asked)
        if commit not in repo.commits:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = repo.commits[commit]
        tag = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
        if rest[:1] == ["resolve"]:
            name = "/".join(rest[2:])
            if name not in files:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return self.answer(200, files[name], ETag=f'"{tag[name]}"', X_Repo_Commit=commit)
        if rest[:1] == ["tree"]:
            return self.answer(
                200,
                [
                    {"type": "file", "path": name, "size": len(content), "oid": tag[name]}
                    for name, content in files.items()
                ],
            )
        siblings = [{"rfilename": name} for name in files]
        about = {"id": repo_id, "sha": commit, "siblings": siblings, "private": repo.private}
        self.answer(200, about)

    do_HEAD = do_GET  # noqa: N815

    # Writing

    def do_PUT(self) -> None:
        content = self.body()
        self.hub.uploads[hashlib.sha256(content).hexdigest()] = content
        self.answer(200)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_POST(self) -> None:
        repo_id, rest = self.path_of()
        body = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"})
        if repo_id == "api/repos":
            return self.create(json.loads(body))
        if repo_id == "api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if repo_id.startswith("org/"):
            return self.answer(403, {"error": "Forbidden"})
        if rest[:1] == ["preupload"]:
            return self.answer(200, {"files": [*map(_mode, json.loads(body)["files"])]})
        if rest[:1] == ["info"]:
            return self.accept_large(json.loads(body))
        repo = self.hub.repos[repo_id]
        if rest[0] == "branch":
            if rest[1] in repo.branches:
                return self.answer(409, {"error": "exists"})
            repo.branches[rest[1]] = repo.branches["main"]
            return self.answer(200, {})
        assert rest[0] == "commit", self.path
        if rest[1] not in repo.branches:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        self.commit(repo_id, rest[1], [json.loads(line) for line in body.splitlines()])

    def create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo_id.startswith("org/"):
            return self.answer(403, {"error": "Forbidden"})
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "id": repo_id}
        if repo_id in self.hub.repos:
            return self.answer(409, url)
        repo = Repo.of({".gitattributes": b"*.safetensors filter=lfs"})
        # Versions of the client say it differently.
        repo.private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repos[repo_id] = repo
        self.answer(200, url)

    def validate(self, card: str) -> None:
        _, front, text = card.split("---\n", 2)
        problems = [] if isinstance(yaml.safe_load(front), dict) and text.strip() else ["invalid"]
        problems += [
            f"no {key}" for key in ("library_name", "tags") if key not in yaml.safe_load(front)
        ]
        listed = {"errors": [{"message": problem} for problem in problems], "warnings": []}
        self.answer(400 if problems else 200, listed)

    def accept_large(self, asked: dict[str, Any]) -> None:
        href = f"{self.hub.endpoint}/uploads"
        objects = [
            {**item, "actions": {"upload": {"href": f"{href}/{item['oid']}"}}}
            for item in asked["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo_id: str, branch: str, lines: list[dict[str, Any]]) -> None:
        repo = self.hub.repos[repo_id]
        files = dict(repo.commits[repo.branches[branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            else:
                assert line["key"] == "deletedFile", line
                del files[value["path"]]
        oid = hashlib.sha1(repr(sorted(files.items())).encode() + branch.encode()).hexdigest()
        repo.commits[oid], repo.branches[branch] = files, oid
        url = f"{self.hub.endpoint}/{repo_id}/commit/{oid}"
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url})


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
