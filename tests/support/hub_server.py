"""A local Hugging Face Hub: the parts of its protocol that its client uses, and faults in them.

The client reaches it through HF_ENDPOINT. It uploads by LFS, so HF_HUB_DISABLE_XET must be set.
"""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, RLock, Thread
from typing import Any, NamedTuple
from urllib.parse import unquote

# Of the first commit of a repository that the hub has from the start.
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Files = dict[str, bytes]


class Commit(NamedTuple):
    """A state of a repository."""

    name: str
    files: Files


@dataclass
class Repo:
    """A repository; the last commit is its main branch."""

    commits: list[Commit]
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        name = self.tags.get(revision, revision)
        if name == "main":
            return self.head
        return next((commit for commit in self.commits if commit.name == name), None)


@dataclass
class Fault:
    """What befalls requests whose "METHOD path" has `match` in it, the first `times` of them."""

    match: str
    action: "int | str | Callable[[Hub], object]"
    """A status, or of an answer with a body: `short` (less than its length says), `cut` (less, with
    its own length right), `wrong bytes` (one is another), `hang`, `close` (no answer at all); or a
    function that is called before the right answer, or instead of it if it returns true."""
    times: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    """Of an answer with that status."""


@dataclass
class Hub:
    """The hub's repositories, from files by "ORG/NAME/FILE"; `status` answers every request."""

    files: Files = field(default_factory=dict)
    status: int | None = None
    faults: list[Fault] = field(default_factory=list)
    token: str | None = None
    """If set, what writes without it is refused."""
    private: set[str] = field(default_factory=set)
    """Repositories that cannot be seen without the token."""
    requests: list[str] = field(default_factory=list)
    authorizations: set[str] = field(default_factory=set)
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: Files = field(default_factory=dict)
    """Of LFS, by sha256."""
    url: str = ""
    lock: Any = field(default_factory=RLock)

    def __post_init__(self) -> None:
        for path, content in self.files.items():
            repo, name = "/".join(path.split("/")[:2]), path.split("/", 2)[2]
            self.repos.setdefault(repo, Repo([Commit(COMMIT, {})])).head.files[name] = content

    def commit(self, repo: Repo, files: Files) -> Commit:
        """Make `files` the main branch of a repository."""
        digest = hashlib.sha1(repo.head.name.encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + hashlib.sha256(content).digest())
        repo.commits.append(Commit(digest.hexdigest(), files))
        return repo.head

    def environment(self, home: Any) -> dict[str, str]:
        """Of a process whose client has its cache in `home`, and this hub alone."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def blob_id(name: str, content: bytes) -> str:
    """The client compares it with its own: sha256 for LFS, else git's."""
    if is_lfs(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refusal(Exception):  # noqa: N818  (an answer of the protocol)
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


# Method, pattern of the path, name of the handler's method; its groups are its arguments.
_REPO = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET", rf"{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
    ("HEAD", rf"{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
    ("GET", r"cdn/([0-9a-f]{64})", "cdn"),
    ("HEAD", r"cdn/([0-9a-f]{64})", "cdn"),
    ("GET", rf"api/models/{_REPO}", "model_info"),
    ("GET", rf"api/models/{_REPO}/revision/([^/]+)", "model_info"),
    ("GET", rf"api/models/{_REPO}/refs", "refs"),
    ("POST", r"api/repos/create", "create_repo"),
    ("POST", r"api/validate-yaml", "validate_yaml"),
    ("POST", rf"api/models/{_REPO}/preupload/([^/]+)", "preupload"),
    ("POST", rf"{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"upload/([0-9a-f]{64})", "lfs_upload"),
    ("POST", r"verify", "lfs_verify"),
    ("POST", rf"api/models/{_REPO}/commit/([^/]+)", "create_commit"),
    ("POST", rf"api/models/{_REPO}/tag/([^/]+)", "create_tag"),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    stopped: Event

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0].strip("/"))
        line = f"{self.command} {path}"
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self._chunks() if self.headers.get("Transfer-Encoding") else b""
        self.body = self.body or self.rfile.read(length)
        self.damage = ""
        with self.hub.lock:
            self.hub.requests.append(line)
            if authorization := self.headers.get("Authorization"):
                self.hub.authorizations.add(authorization)
            fault = self._fault(line)
        if fault is not None:
            if isinstance(fault.action, int):
                return self.reply(fault.action, b"", fault.headers)
            if fault.action == "close":
                return self._close()
            if fault.action == "hang":
                self.stopped.wait(30)
                return self._close()
            if isinstance(fault.action, str):
                self.damage = fault.action
            elif fault.action(self.hub):
                return self._close()
        if self.hub.status is not None:
            return self.reply(self.hub.status, b"", {})
        try:
            for method, pattern, name in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    with self.hub.lock:
                        answer = getattr(self, name)(*match.groups())
                    return self.reply(*answer) if isinstance(answer, tuple) else self.json(answer)
            raise Refusal(404)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            text = json.dumps({"error": str(refusal)}).encode()
            return self.reply(refusal.status, text, {**headers, "X-Error-Message": str(refusal)})

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _fault(self, line: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.match in line and fault.times != 0:
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None

    def _close(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _repo(self, name: str) -> Repo:
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if name not in self.hub.repos or (name in self.hub.private and not known):
            # As the hub does, which does not tell a stranger what there is.
            raise Refusal(404 if known else 401, "RepoNotFound", "Repository Not Found")
        return self.hub.repos[name]

    def _commit(self, repo: str, revision: str) -> Commit:
        commit = self._repo(repo).at(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", "Revision Not Found")
        return commit

    def _may_write(self) -> None:
        right = f"Bearer {self.hub.token}"
        if self.hub.token is not None and self.headers.get("Authorization") != right:
            raise Refusal(401, message="Invalid username or password.")

    def resolve(self, repo: str, revision: str, name: str) -> tuple[int, bytes, dict[str, str]]:
        commit = self._commit(repo, revision)
        if name not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        content = commit.files[name]
        headers = {"X-Repo-Commit": commit.name, "ETag": f'"{blob_id(name, content)}"'}
        if not is_lfs(name):
            return 200, content, headers
        digest = blob_id(name, content)
        self.hub.objects[digest] = content
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        # Another host, as the hub's: its client follows redirects on the same one by itself.
        cdn = self.hub.url.replace("127.0.0.1", "localhost")
        return 302, b"", {**headers, "Location": f"{cdn}/cdn/{digest}"}

    def cdn(self, digest: str) -> tuple[int, bytes, dict[str, str]]:
        content = self.hub.objects[digest]
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, size = int(match[1]), len(content)
            return 206, content[start:], {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
        return 200, content, {"ETag": f'"{digest}"'}

    def model_info(self, repo: str, revision: str = "main") -> dict[str, Any]:
        commit = self._commit(repo, revision)
        siblings = []
        for name, content in commit.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
            entry["blobId"] = hashlib.sha1(content).hexdigest()
            if is_lfs(name):
                digest = blob_id(name, content)
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 100}
            siblings.append(entry)
        return {"id": repo, "modelId": repo, "sha": commit.name, "siblings": siblings, "tags": []}

    def refs(self, repo: str) -> dict[str, Any]:
        found = self._repo(repo)
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": found.head.name}
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
            for name, commit in found.tags.items()
        ]
        return {"branches": [main], "converts": [], "tags": tags}

    def create_repo(self) -> "dict[str, Any] | tuple[int, bytes, dict[str, str]]":
        self._may_write()
        request = json.loads(self.body)
        name = f"{request['organization']}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": "0"}
        if name in self.hub.repos:
            return 409, json.dumps(answer).encode(), {"Content-Type": "application/json"}
        first = Commit(hashlib.sha1(name.encode()).hexdigest(), {".gitattributes": b"* lfs\n"})
        self.hub.repos[name] = Repo([first])
        if request.get("private"):
            self.hub.private.add(name)
        return answer

    def validate_yaml(self) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def preupload(self, repo: str, revision: str) -> dict[str, Any]:
        self._may_write()
        files = self._commit(repo, revision).files
        return {
            "files": [
                {
                    "path": (path := file["path"]),
                    "uploadMode": "lfs" if is_lfs(path) else "regular",
                    "shouldIgnore": False,
                    "oid": blob_id(path, files[path]) if path in files else None,
                }
                for file in json.loads(self.body)["files"]
            ]
        }

    def lfs_batch(self, repo: str) -> dict[str, Any]:
        self._may_write()
        answers = []
        for item in json.loads(self.body)["objects"]:
            answer = dict(item)
            if item["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/upload/{item['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify"}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def lfs_upload(self, digest: str) -> dict[str, Any]:
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise Refusal(400, message="another sha256")
        self.hub.objects[digest] = self.body
        return {}

    def lfs_verify(self) -> dict[str, Any]:
        item = json.loads(self.body)
        if len(self.hub.objects.get(item["oid"], b"")) != item["size"]:
            raise Refusal(404, message="no such object")
        return {}

    def create_commit(self, repo: str, revision: str) -> dict[str, Any]:
        self._may_write()
        found = self._repo(repo)
        files = dict(found.head.files)
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                if value.get("parentCommit") not in (None, found.head.name):
                    raise Refusal(412, message="A commit has happened since. Please refresh.")
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, message="the LFS object is missing")
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                raise Refusal(400, message=f"unknown operation {item['key']}")
        name = self.hub.commit(found, files).name
        return {"commitUrl": f"{self.hub.url}/{repo}/commit/{name}", "commitOid": name}

    def create_tag(self, repo: str, revision: str) -> dict[str, Any]:
        self._may_write()
        tag, tags = json.loads(self.body)["tag"], self._repo(repo).tags
        if tag in tags:
            raise Refusal(409, message=f"Tag {tag} already exists")
        tags[tag] = self._commit(repo, revision).name
        return {}

    def json(self, content: Any) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        size = len(content)
        if self.damage in ("short", "cut"):
            content = content[: size // 2]
        elif self.damage == "wrong bytes" and content:
            middle = size // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        length = len(content) if self.damage == "cut" else size
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        if self.damage == "short":
            self.wfile.flush()
            self._close()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve a hub at `hub.url`."""
    stopped = Event()
    handler = type("HubHandler", (Handler,), {"hub": hub, "stopped": stopped})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()
