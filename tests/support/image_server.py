"""An HTTP server of one image whose paths name its behavior, for tests of fetching images by URL."""

import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ImageServer:
    """A server whose paths name its behavior; counts requests and the most that were open at a time."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.requests: Counter[str] = Counter()
        self.open = self.most_open = 0  # of the slow requests
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with server.lock:
                    server.requests[self.path] += 1
                try:
                    server.answer(self)
                except OSError:  # the client gave up
                    self.close_connection = True

            def log_message(self, format: str, *arguments: Any) -> None:
                """Do nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path
        if path.startswith("/redirect/"):
            self.send(handler, 302, b"", {"Location": path.removeprefix("/redirect")})
        elif path.startswith("/to/"):
            self.send(handler, 302, b"", {"Location": path.removeprefix("/to/")})
        elif path == "/circle":
            self.send(handler, 302, b"", {"Location": "/circle"})
        elif path.startswith("/status/"):
            self.send(handler, int(path.rpartition("/")[2]), b"no image")
        elif path == "/once-503" and self.requests[path] == 1:
            self.send(handler, 503, b"")
        elif path == "/empty":
            self.send(handler, 200, b"")
        elif path == "/large":
            self.send(handler, 200, bytes(100_000))
        elif path == "/hangs":
            time.sleep(3.0)  # the fault itself
        elif path == "/drips":
            self.drip(handler)
        elif path == "/cut":
            self.send(handler, 200, self.image, {"Content-Length": str(len(self.image) + 500)})
            handler.close_connection = True
        elif path == "/garbage":
            handler.wfile.write(b"this is not HTTP\r\n\r\n")
            handler.close_connection = True
        elif path == "/hangs-up":
            handler.close_connection = True
        elif path.startswith("/slow"):
            with self.lock:
                self.open += 1
                self.most_open = max(self.most_open, self.open)
            time.sleep(0.05)  # long enough for others to arrive
            with self.lock:
                self.open -= 1
            self.send(handler, 200, self.image)
        else:
            self.send(handler, 200, self.image)

    def send(
        self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def drip(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(30):
            handler.wfile.write(b"x")
            time.sleep(0.1)  # the fault itself

    def close(self) -> None:
        self._server.shutdown()
