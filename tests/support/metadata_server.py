"""A local stand-in for the instance metadata services of AWS and Google Cloud."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class MetadataServer(ThreadingHTTPServer):
    """Answers as the metadata service of `cloud` ("aws", "gcp" or "" for neither).

    The preemption notice is given while `preempted` is set. The next `failures` GET requests are answered with 503.
    `queried` is set at the first GET request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.cloud = ""
        self.preempted = False
        self.failures = 0
        self.queried = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def do_PUT(self) -> None:
        ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self._respond(200 if ttl and self.server.cloud == "aws" else 403, "session")

    def do_GET(self) -> None:
        self.server.queried.set()
        if self.server.failures:
            self.server.failures -= 1
            self._respond(503, "")
        elif self.server.cloud == "aws" and self.path == "/latest/meta-data/spot/instance-action":
            self._respond_as_aws()
        elif self.server.cloud == "gcp" and self.headers.get("Metadata-Flavor") == "Google":
            preempted = "TRUE" if self.server.preempted else "FALSE"
            self._respond(200, preempted if self.path.endswith("/instance/preempted") else "1")
        else:
            self._respond(404, "")

    def _respond_as_aws(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != "session":
            self._respond(401, "")
        elif not self.server.preempted:
            self._respond(404, "")
        else:
            deadline = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 120))
            self._respond(200, json.dumps({"action": "terminate", "time": deadline}))

    def _respond(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Suppress the log line of each request."""
