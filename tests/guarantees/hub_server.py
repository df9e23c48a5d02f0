"""A model hub for the tests of weights_download.sh: the API, /resolve/, a redirect to a CDN, and
ways of going wrong.

It knows HTTP and what the hub promises (sizes, hashes); it does not know the script.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

# The commit that every branch of this hub points to, unless a test moves it.
SHA = "0123456789abcdef0123456789abcdef01234567"


class Request(NamedTuple):
    path: str
    range: str | None
    authorization: str | None


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """`with Hub({name: content}) as hub:` serves at hub.url.

    The attributes below may be changed while it runs.
    """

    def __init__(self, files: dict[str, bytes], host: str = "127.0.0.1"):
        self.files, self.host = files, host
        self.lfs = {
            name for name in files if name.endswith((".bin", ".safetensors", ".model", ".pth"))
        }
        self.sha = SHA
        self.requests: list[Request] = []
        # What Authorization must carry for anything but the API, as for gated repositories.
        self.token = None
        self.status: dict[str, list[int]] = {}  # name -> status codes to answer with first
        self.served: dict[str, bytes] = {}  # name -> other content than the API announces
        self.cuts: dict[
            str, list[int]
        ] = {}  # name -> after how many bytes to drop the connection, request by request
        self.ranges = True
        self.cdn: Hub | None = None  # big files are sent off to there
        self.stall_after: int | None = None  # bytes of a big file, then nothing until `released`
        self.released = threading.Event()
        self.on_request = lambda: None
        self.indent = None  # of the API's JSON

    def api(self, repo: str) -> str:
        siblings = []
        for name, content in self.files.items():
            entry = {"rfilename": name, "size": len(content), "blobId": git_blob(content)}
            if (
                name in self.lfs
            ):  # then the blob is a pointer file, and its id says nothing about the content
                pointer = {
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 135,
                }
                entry |= {"blobId": git_blob(b"pointer"), "lfs": pointer}
            siblings.append(entry)
        # What misleads a parser made of grep: other "sha" keys, braces and quotes in strings.
        misleading = {
            "sha": "f" * 40,
            "text": '{"sha": "\\" }]}, {"rfilename":"x"',
            "list": [[], {}, [1.5e3, None]],
        }
        tags = ["sha", "{", "\u00e9"]
        model = {
            "id": repo,
            "config": misleading,
            "tags": tags,
            "sha": self.sha,
            "siblings": siblings,
            "end": misleading,
        }
        return json.dumps(model, indent=self.indent)

    def asked(self, ending: str) -> list[Request]:
        return [request for request in self.requests if request.path.endswith(ending)]

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.requests.append(
                    Request(self.path, self.headers["Range"], self.headers["Authorization"])
                )
                hub.on_request()
                hub.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(
            (self.host if self.host != "localhost" else "127.0.0.1", 0), Handler
        )
        self.url = f"http://{self.host}:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *exc):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, http):
        path = http.path.split("?")[0]
        if path.startswith("/api/models/"):
            repo, _, _ = path.removeprefix("/api/models/").partition("/revision/")
            code = self.status.get("api", [])
            if code:
                return self.send(http, code.pop(0), b'{"error":"as told"}')
            return self.send(http, 200, self.api(repo).encode())

        name = next(
            (n for n in sorted(self.files, key=len, reverse=True) if path.endswith("/" + n)), None
        )
        if self.token and http.headers["Authorization"] is None:
            return self.send(http, 401, b"Access to this model is restricted.")
        if self.token and http.headers["Authorization"] != f"Bearer {self.token}":
            return self.send(http, 403, b"You are not in the authorized list.")
        if name is None:
            return self.send(http, 404, b"Entry not found")
        if self.status.get(name):
            return self.send(http, self.status[name].pop(0), b"as told")
        if self.cdn and name in self.lfs:
            return self.send(http, 302, b"Found", Location=f"{self.cdn.url}/signed/{name}")
        if self.cdn and "/resolve/" in path:  # small files: another path on the same host
            return self.send(http, 307, b"Moved", Location=f"/cache/{name}")

        content, status, headers = self.served.get(name, self.files[name]), 200, {}
        if self.ranges and http.headers["Range"]:
            first = int(http.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if first >= len(content):
                return self.send(http, 416, b"")
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content, status = content[first:], 206
        cut = self.cuts[name].pop(0) if self.cuts.get(name) else None
        if self.stall_after is not None and name in self.lfs:
            cut = self.stall_after
        self.send(http, status, content, cut, **headers)

    def send(self, http, status, content, cut=None, **headers):
        http.send_response(status)
        http.send_header("Content-Length", str(len(content)))
        for key, value in headers.items():
            http.send_header(key, value)
        http.end_headers()
        try:
            http.wfile.write(content[:cut])
            if cut is not None:
                http.wfile.flush()
                if self.stall_after is not None:
                    self.released.wait(10)
                http.close_connection = True
        except (BrokenPipeError, ConnectionResetError):  # the client was killed: that is the test
            http.close_connection = True
