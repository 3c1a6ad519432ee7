"""How resolving and staging a corpus in a bucket grow with its rows: `python jobs/bench/prepare.py --scale`.

An S3 server (moto) runs on this machine behind a proxy that delays every request by 20 ms and counts them. Small images
are repeated. Resolving identifies a source's content, as every command does; the second time reads what the first has
kept in storage. Staging divides the rows among shards, once per corpus, on the driver.
"""

import http.client
import io
import json
import os
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from raylava.config.recipe import Corpus, Source
from raylava.corpus.shards import PrepareSpec, stage_rows
from raylava.corpus.source_cache import SourceCache, build_indexes
from raylava.corpus.sources import SourceFiles
from raylava.storage import StoragePath, storage_path

LATENCY_S = 0.02
IMAGES = 1000  # distinct images, to which rows refer in turn
IMAGE = b"\xff\xd8" + bytes(800)  # never decoded: neither resolving nor staging reads images
FORMATS = ("json", "jsonl", "parquet", "tar")
MAX_TAR_ROWS = 100_000  # a tar of more rows does not fit the server's memory
_HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "expect")  # headers of one connection
TARGETS = (558_000, 10_000_000, 1_000_000_000)


@dataclass(frozen=True)
class ScaleResult:
    """Seconds and requests of resolving for the first and the second time, and of staging; peak memory in MB."""

    format: str
    rows: int
    megabytes: float
    first: tuple[float, int]
    second: tuple[float, int]
    staging: tuple[float, int]
    memory: float


class LatencyProxy:
    """An HTTP proxy that delays and counts requests."""

    def __init__(self, upstream: str) -> None:
        self.requests = 0
        proxy, target = self, urlsplit(upstream)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                proxy.requests += 1
                time.sleep(LATENCY_S)
                body = self._body()
                headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
                connection = http.client.HTTPConnection(target.hostname or "", target.port)
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in (*_HOP_BY_HOP, "content-length"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)
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

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

            def log_message(self, format: str, *arguments: Any) -> None:
                """Do nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"


def run(spec: PrepareSpec, rows: list[int]) -> None:
    """Measure corpora of these sizes in each format, and print the table; `spec` has tokenizer and backbone."""
    import logging

    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    boto3.client("s3").create_bucket(Bucket="bench")
    images = storage_path("s3://bench/images")
    for number in range(IMAGES):
        (images / f"{number}.jpg").write_bytes(IMAGE)
    proxy = LatencyProxy(os.environ["AWS_ENDPOINT_URL"])
    results = []
    for format_name in FORMATS:
        for count in rows:
            if format_name == "tar" and count > MAX_TAR_ROWS:
                continue
            file = storage_path(f"s3://bench/rows-{count}.{format_name}")
            file.write_bytes(ENCODERS[format_name](count))
            os.environ["AWS_ENDPOINT_URL"] = proxy.url
            results.append(measure(spec, format_name, count, file, images, proxy))
            os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
            file.delete()
    server.stop()
    print_results(results)


def measure(
    spec: PrepareSpec, format_name: str, rows: int, file: StoragePath, images: StoragePath, proxy: LatencyProxy
) -> ScaleResult:
    """Measure one corpus, whose annotations and images are read through the proxy."""
    source = Source(annotations=file.name)
    files = SourceFiles(source, file.uri, images.uri)
    scanned = storage_path(f"s3://bench/scanned-{format_name}-{rows}")
    output = storage_path(f"s3://bench/out-{format_name}-{rows}")
    time.sleep(2.5)  # the index of a file that was just written is not kept
    memory = PeakMemory()

    def timed(action: Callable[[], Any]) -> tuple[float, int]:
        before, started = proxy.requests, time.monotonic()
        action()
        return time.monotonic() - started, proxy.requests - before

    first = timed(lambda: SourceCache().fingerprint_fields(files, scanned))
    second = timed(lambda: SourceCache().fingerprint_fields(files, scanned))
    corpus = Corpus(sources=(source,))
    paths = ((file.uri, images.uri),)
    staged = PrepareSpec("scale", corpus, paths, spec.language, spec.vision, output.uri)

    def stage() -> None:
        indexes = SourceCache().indexes(scanned)
        build_indexes(indexes, files.annotation_files)
        stage_rows(staged, output, indexes)

    staging = timed(stage)
    return ScaleResult(format_name, rows, file.info().size / 1e6, first, second, staging, memory.stop())


class PeakMemory:
    """Samples the growth of this process's resident memory, in MB."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(0.05):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def stop(self) -> float:
        """Return the peak since the start."""
        self._stop.set()
        self._thread.join()
        return (self._peak - self._start) / 1e6


def _row(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": f"Caption {number} of it."}]
    return {"id": str(number), "image": f"{number % IMAGES}.jpg", "conversations": turns}


def _json(rows: int) -> bytes:
    return b"[" + b",".join(json.dumps(_row(number)).encode() for number in range(rows)) + b"]"


def _jsonl(rows: int) -> bytes:
    return b"".join(json.dumps(_row(number)).encode() + b"\n" for number in range(rows))


def _parquet(rows: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([_row(number) for number in range(rows)]), buffer, row_group_size=10_000)
    return buffer.getvalue()


def _tar(rows: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(rows):
            for suffix, content in (("jpg", IMAGE), ("txt", f"Caption {number} of it.".encode())):
                info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


ENCODERS: dict[str, Callable[[int], bytes]] = {"json": _json, "jsonl": _jsonl, "parquet": _parquet, "tar": _tar}


def print_results(results: list[ScaleResult]) -> None:
    """Print the measurements, and what the largest of each format predicts for larger corpora."""
    table = Table(title=f"S3 with {1000 * LATENCY_S:.0f} ms latency; {IMAGES} images", title_justify="left")
    headings = (
        "format",
        "rows",
        "MB",
        "resolve s",
        "requests",
        "again s",
        "requests",
        "stage s",
        "requests",
        "peak MB",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "format" else "right")
    for result in results:
        cells = [f"{result.rows:,}", f"{result.megabytes:.0f}"]
        for seconds, requests in (result.first, result.second, result.staging):
            cells += [f"{seconds:.2f}", str(requests)]
        table.add_row(result.format, *cells, f"{result.memory:.0f}")
    console = Console(file=sys.stdout, width=120)
    console.print(table)
    for name in FORMATS:
        largest = max((result for result in results if result.format == name), key=lambda result: result.rows)
        seconds = largest.first[0] + largest.staging[0]
        hours = ", ".join(f"{rows:,} rows {seconds / largest.rows * rows / 3600:.2g} h" for rows in TARGETS)
        console.print(f"{name}: resolving and staging at the rate of {largest.rows:,} rows: {hours}")
