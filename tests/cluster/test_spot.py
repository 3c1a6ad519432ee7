"""The cloud's notice that a node goes becomes a drain of that node. A local server stands in for the metadata."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from raylava.cluster.preemption import Aws, Gcp, Notice, find_provider, watch
from raylava.errors import UserError


class Metadata(ThreadingHTTPServer):
    """Of one cloud, or of none; `goes` once the machine is to be taken."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.cloud = ""
        self.goes = False
        self.fails = 0
        self.asked = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        wants = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self._answer(200 if wants and self.server.cloud == "aws" else 403, "session")

    def do_GET(self) -> None:
        self.server.asked.set()
        if self.server.fails:
            self.server.fails -= 1
            self._answer(503, "")
        elif self.server.cloud == "aws" and self.path == "/latest/meta-data/spot/instance-action":
            self._aws()
        elif self.server.cloud == "gcp" and self.headers.get("Metadata-Flavor") == "Google":
            preempted = "TRUE" if self.server.goes else "FALSE"
            self._answer(200, preempted if self.path.endswith("/instance/preempted") else "1")
        else:
            self._answer(404, "")

    def _aws(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != "session":
            self._answer(401, "")
        elif not self.server.goes:
            self._answer(404, "")
        else:
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 120))
            self._answer(200, json.dumps({"action": "terminate", "time": when}))

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    server = Metadata()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("RAYLAVA_METADATA", server.url)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("cloud", "kind", "seconds"), [("aws", Aws, 120), ("gcp", Gcp, 30)])
def test_each_clouds_notice_is_understood_with_its_deadline(
    metadata: Metadata, cloud: str, kind: type, seconds: float
) -> None:
    metadata.cloud = cloud
    provider = find_provider()
    assert isinstance(provider, kind)
    assert provider.notice() is None
    metadata.goes = True
    notice = provider.notice()
    assert notice is not None
    assert notice.deadline - time.time() == pytest.approx(seconds, abs=5)


def test_a_machine_of_no_cloud_is_told(metadata: Metadata) -> None:
    with pytest.raises(UserError, match="neither AWS's nor Google Cloud's"):
        find_provider(patience_seconds=0.0)


def test_a_drain_that_fails_is_tried_again(metadata: Metadata) -> None:
    metadata.cloud, metadata.goes = "aws", True
    tried: list[Notice] = []

    def drain(notice: Notice) -> None:
        tried.append(notice)
        if len(tried) < 3:
            raise ConnectionError("GCS is away")

    watch(Aws(metadata.url), drain, poll_seconds=0.01)
    assert len(tried) == 3


def test_metadata_that_does_not_answer_is_asked_again(metadata: Metadata) -> None:
    metadata.cloud, metadata.goes, metadata.fails = "aws", True, 3
    drained: list[Notice] = []
    watch(Aws(metadata.url), drained.append, poll_seconds=0.01)
    assert len(drained) == 1
    assert metadata.fails == 0


@pytest.mark.slow
def test_the_command_drains_its_node_when_the_notice_comes(metadata: Metadata) -> None:
    """In a cluster of its own, which this process only asks and never joins."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        metadata.cloud = "gcp"
        command = ["watch-spot", "--address", cluster.address, "--node-id", node.node_id]
        watching = subprocess.Popen([sys.executable, "-m", "raylava.cli", *command], stderr=subprocess.PIPE, text=True)
        assert metadata.asked.wait(30)
        assert is_alive(cluster.address, node.node_id)
        metadata.goes = True
        _, told = watching.communicate(timeout=30)
        assert watching.returncode == 0, told
        assert "Google Cloud preempts this instance" in told
        deadline = time.monotonic() + 30
        while is_alive(cluster.address, node.node_id):  # a drained node that is idle goes at once
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        cluster.shutdown()


def is_alive(address: str, node_id: str) -> bool:
    nodes = {key.hex(): node for key, node in GcsClient(address=address).get_all_node_info().items()}
    return bool(nodes[node_id].state == GcsNodeInfo.ALIVE)
