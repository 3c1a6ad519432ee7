"""An HTTP proxy before a server, which can be told to answer 503, or to hang and then hang up."""

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class FlakyProxy:
    """`mode` is "well", "refusing" (503), "hanging" (a second, then the connection is cut) or "slow" (0.1 s more).

    It holds for requests whose path contains `only`.
    """

    def __init__(self, upstream: str) -> None:
        self.mode, self.only = "well", ""
        self.failed: list[float] = []  # when requests were refused or left to hang, by time.time()
        self.gets: list[str] = []  # the paths of objects that were read, whole or in part, and of listings
        self.heads: list[str] = []
        proxy, target = self, urlsplit(upstream)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                body = self._body()
                mode = proxy.mode if proxy.only in self.path else "well"
                if mode in ("hanging", "refusing"):
                    proxy.failed.append(time.time())
                if mode == "hanging":
                    time.sleep(1.0)  # the fault itself
                    self.close_connection = True
                    return
                if mode == "refusing":
                    self._answer(503, {}, b"")
                    return
                if mode == "slow":
                    time.sleep(0.1)  # the fault itself
                connection = http.client.HTTPConnection(target.hostname or "", target.port)
                headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                if self.command == "HEAD":
                    proxy.heads.append(urlsplit(self.path).path)
                if self.command == "GET" and answer.status in (200, 206):
                    proxy.gets.append(urlsplit(self.path).path)
                self._answer(answer.status, dict(answer.getheaders()), content)
                connection.close()

            def _body(self) -> bytes:
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response_only(status)
                kept = {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
                for name, value in (kept | {"Content-Length": length}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

            def log_message(self, format: str, *arguments: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "expect"}
