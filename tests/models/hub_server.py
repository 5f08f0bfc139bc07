"""A local stand-in for the Hugging Face Hub: what its client asks for to download a file."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Files by "ORG/NAME/FILE"; `status` answers every request instead of them."""

    files: dict[str, bytes] = field(default_factory=dict)
    status: int | None = None
    requests: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0].strip("/")
            hub.requests.append(f"{self.command} {path}")
            if hub.status is not None:
                return self.reply(hub.status, b"", {})
            if path.startswith("api/models/"):
                return self.model_info(path.removeprefix("api/models/"))
            match = re.fullmatch(r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if match is None or match[2] not in ("main", COMMIT):
                return self.reply(404, b"", {})
            content = hub.files.get(f"{match[1]}/{match[3]}")
            if content is None:
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            digest = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
            return self.reply(200, content, headers, body)

        def model_info(self, path: str) -> None:
            repo = "/".join(path.split("/")[:2])
            names = [n.removeprefix(repo + "/") for n in hub.files if n.startswith(repo + "/")]
            if not names:
                return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
            siblings = []
            for name in names:
                content = hub.files[f"{repo}/{name}"]
                lfs = {
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 100,
                }
                siblings.append({"rfilename": name, "size": len(content), "lfs": lfs})
            info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []}
            return self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

        def reply(
            self, status: int, content: bytes, headers: dict[str, str], body: bool = True
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
