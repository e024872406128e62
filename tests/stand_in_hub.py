"""A stand-in of the hub on the loopback interface: the HTTP endpoints that the real client calls, kept in memory."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

TOKEN = "hf_stand_in"
BIG = 100_000  # bytes; larger files go through the LFS endpoints, as weights do


class StandInHub(ThreadingHTTPServer):
    """Starts listening when it is made; `endpoint` is what goes into `HF_ENDPOINT`.

    Attributes:
        repos: Files of each repository, `{repo_id: {path: bytes}}`.
        uploads: Files that came through the LFS endpoints, by their SHA-256.
        commits: The paths of each commit, in order.
        versions: All files of its repository after each commit.
        requests: Method and path of each request, in order.
        breaks: Regular expression. The connection of a request whose "METHOD /path" matches it breaks half-way
            through the body.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.uploads: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.versions: list[dict[str, bytes]] = []
        self.requests: list[str] = []
        self.breaks: str | None = None
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that hangs up is no error of the hub's."""

    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandInHub

    def log_message(self, *args):
        pass

    def _handle(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        hub.requests.append(request)
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if hub.breaks and re.search(hub.breaks, request):
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.close()
            return
        is_open = self.command not in ("POST", "PUT") or path.startswith("/lfs/") or path == "/api/validate-yaml"
        if not is_open and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._read()
            return self._send(401, {"error": "Invalid username or password."})
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, request):
                return method(self, *match.groups())
        self._read()
        self._send(404, {"error": f"The stand-in has no {request}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content=b"", headers: dict[str, str] | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str, headers: dict[str, str] | None = None):
        self._send(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def validate_yaml(self):
        """The hub's own checks of a card's front matter, as far as they concern what a model card of ours holds."""
        content = json.loads(self._read())["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.S)
        data = yaml.safe_load(match[1]) if match else {}
        errors = [
            f'"{name}" must be a string'
            for name in ("license", "pipeline_tag", "library_name")
            if name in data and not isinstance(data[name], str)
        ]
        errors += [
            f'"{name}" must be a list of strings'
            for name in ("tags", "datasets")
            if not all(isinstance(value, str) for value in data.get(name, []))
        ]
        try:
            if data.get("model-index"):
                model_index_to_eval_results(data["model-index"])
        except (KeyError, TypeError) as error:
            errors.append(f'"model-index" is malformed: {error!r}')
        self._send(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def create_repo(self):
        body, hub = json.loads(self._read()), self.server
        repo_id = f"{body.get('organization') or 'user'}/{body['name']}"
        status = 409 if repo_id in hub.repos else 200
        hub.repos.setdefault(repo_id, {})
        self._send(status, {"url": f"{hub.endpoint}/{repo_id}", "id": repo_id})

    def repo_info(self, repo_id: str):
        files = self.server.repos.get(repo_id)
        if files is None:
            return self._missing("RepoNotFound")
        siblings = [{"rfilename": path} for path in files]
        self._send(200, {"id": repo_id, "modelId": repo_id, "sha": self.server.sha(), "siblings": siblings})

    def tree(self, repo_id: str, folder: str | None):
        files = self.server.repos.get(repo_id)
        if files is None:
            return self._missing("RepoNotFound")
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _git_sha(content)}
            for path, content in files.items()
            if path.startswith(folder or "")
        ]
        if folder and not entries:
            return self._missing("EntryNotFound")
        self._send(200, entries)

    def preupload(self, repo_id: str):
        old = self.server.repos.get(repo_id, {})
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > BIG else "regular",
                "shouldIgnore": False,
                "oid": _oid(old[file["path"]]) if file["path"] in old else None,
            }
            for file in json.loads(self._read())["files"]
        ]
        self._send(200, {"files": files})

    def lfs_batch(self, repo_id: str):
        objects = json.loads(self._read())["objects"]
        for entry in objects:
            if entry["oid"] not in self.server.uploads:
                entry["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{entry['oid']}"}}
        self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str):
        content = self._read()
        if hashlib.sha256(content).hexdigest() != oid:
            return self._send(400, {"error": "the content is not what was announced"})
        self.server.uploads[oid] = content
        self._send(200)

    def commit(self, repo_id: str):
        files, changed = dict(self.server.repos[repo_id]), []
        for line in self._read().splitlines():
            entry = json.loads(line)
            value, kind = entry["value"], entry["key"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            if kind != "header":
                changed.append(value["path"])
        self.server.repos[repo_id] = files
        self.server.commits.append(changed)
        self.server.versions.append(files)
        url = f"{self.server.endpoint}/{repo_id}/commit/{self.server.sha()}"
        self._send(200, {"success": True, "commitOid": self.server.sha(), "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo_id: str, path: str):
        files = self.server.repos.get(repo_id)
        if files is None:
            return self._missing("RepoNotFound")
        if path not in files:
            return self._missing("EntryNotFound", {"X-Repo-Commit": self.server.sha()})
        headers = {"X-Repo-Commit": self.server.sha(), "ETag": f'"{_git_sha(files[path])}"'}
        self._send(200, files[path], headers)


def _oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if len(content) > BIG else _git_sha(content)


def _git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    "POST /api/validate-yaml": _Handler.validate_yaml,
    "POST /api/repos/create": _Handler.create_repo,
    f"GET /api/models/{REPO}(?:/revision/[^/]+)?": _Handler.repo_info,
    f"GET /api/models/{REPO}/tree/[^/]+(?:/(.+))?": _Handler.tree,
    f"POST /api/models/{REPO}/preupload/[^/]+": _Handler.preupload,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": _Handler.lfs_batch,
    r"PUT /lfs/(\w+)": _Handler.lfs_put,
    f"POST /api/models/{REPO}/commit/[^/]+": _Handler.commit,
    f"(?:GET|HEAD) /{REPO}/resolve/[^/]+/(.+)": _Handler.resolve,
}
