"""Plans corpus preparation: nodes and hours for a number of images within the request limits of an object store.

Pure functions. Assumptions are fields of `IngestSpec`; the throughput of a core was measured with
jobs/bench/prepare.py or is given by the caller.
"""

import math
from dataclasses import dataclass

IMAGES_PER_CORE = 100.0  # images/s: decode a 640×480 JPEG, pad, resize to 336, encode (jobs/bench/README.md)
ROWS_INDEXED_PER_CORE = 80_000.0  # rows/s of JSON Lines (jobs/bench/README.md)
ROWS_STAGED = 60_000.0  # rows/s, by the driver (jobs/bench/README.md)
UNLIMITED_NODES = 1_000_000  # value of IngestPlan.max_nodes if the storage limits no number of nodes
_KEYS_PER_LIST = 1_000  # keys returned by one LIST request (S3)


@dataclass(frozen=True)
class StorageLimits:
    """Limits of an object store; the defaults are those of S3.

    Requests/s per key prefix (documented: 5,500 GET and 3,500 PUT), bytes/s of a node, seconds to the first byte, and
    the requests that one core keeps in flight.
    """

    gets_per_second: float = 5_500
    puts_per_second: float = 3_500
    lists_per_second: float = 5_500
    node_bandwidth: float = 1.25e9
    latency_s: float = 0.03
    requests_in_flight: int = 1

    @classmethod
    def local_disk(cls) -> "StorageLimits":
        """Return the limits of a folder that every node can access: no request limits and no latency."""
        return cls(
            gets_per_second=math.inf,
            puts_per_second=math.inf,
            lists_per_second=math.inf,
            node_bandwidth=2e9,
            latency_s=0.0,
        )


@dataclass(frozen=True)
class IngestSpec:
    """The preparation of `images` images on nodes with `cores` CPU cores.

    `image_bytes` is the size of a source image, `block_bytes` that of a prepared sample. `images_per_shard` images are
    read with one request from packed sources (WebDataset, Parquet); it is 1 for single files.
    `rows_indexed_per_core` and `rows_staged` are rows/s of a core that indexes annotations and of the driver that
    divides rows among shards.
    """

    images: int
    cores: int = 64
    images_per_core: float = IMAGES_PER_CORE
    image_bytes: float = 150e3
    block_bytes: float = 79e3
    samples_per_block: int = 2048
    images_per_shard: int = 1
    prefixes: int = 1
    storage: StorageLimits = StorageLimits()
    rows_indexed_per_core: float = ROWS_INDEXED_PER_CORE
    rows_staged: float = ROWS_STAGED


@dataclass(frozen=True)
class IngestPlan:
    """Predicted throughput and duration of preparing a corpus on `nodes` nodes.

    `bottleneck` names what limits `images_per_second`. `listing_hours` is the time to list the source files; raylava
    reads paths from the annotations and never lists, so it only matters for writing annotations from a listing.
    `staging_hours` come before `hours`: indexing the annotations, once, on all nodes, and staging rows on the driver.
    `max_nodes` is the number of nodes beyond which the storage rejects requests (HTTP 503).
    """

    nodes: int
    images_per_second: float
    hours: float
    bottleneck: str
    node_hours: float
    requests: float
    requests_per_second: float
    listing_hours: float
    staging_hours: float
    stored_bytes: float
    max_nodes: int


def plan_ingest(spec: IngestSpec, nodes: int | None = None, within_hours: float = 24.0) -> IngestPlan:
    """Return the plan for `nodes` nodes, or for the fewest that finish within `within_hours` and the storage limits."""
    node_rates, storage_rates = _node_rates(spec), _storage_rates(spec)
    node_bottleneck = min(node_rates, key=lambda name: node_rates[name])
    storage_bottleneck = min(storage_rates, key=lambda name: storage_rates[name])
    node_rate, storage_rate = node_rates[node_bottleneck], storage_rates[storage_bottleneck]
    max_nodes = int(min(storage_rate / node_rate, UNLIMITED_NODES))
    images_per_node = max(1, int(node_rate * within_hours * 3600))
    planned_nodes = nodes or min(max(1, max_nodes), max(1, -(-int(spec.images) // images_per_node)))
    rate = min(planned_nodes * node_rate, storage_rate)
    hours = spec.images / rate / 3600
    requests = spec.images / spec.images_per_shard + spec.images / spec.samples_per_block
    list_rate = min(10.0, spec.storage.lists_per_second)
    return IngestPlan(
        nodes=planned_nodes,
        images_per_second=rate,
        hours=hours,
        bottleneck=node_bottleneck if planned_nodes * node_rate <= storage_rate else storage_bottleneck,
        node_hours=hours * planned_nodes,
        requests=requests,
        requests_per_second=requests / hours / 3600,
        staging_hours=_staging_hours(spec, planned_nodes),
        listing_hours=spec.images / spec.images_per_shard / _KEYS_PER_LIST / list_rate / 3600,
        stored_bytes=spec.images * spec.block_bytes,
        max_nodes=max(1, max_nodes),
    )


def _staging_hours(spec: IngestSpec, nodes: int) -> float:
    """Return the hours of indexing annotations on all cores and of staging the rows on the driver."""
    indexing = spec.images / (spec.rows_indexed_per_core * spec.cores * nodes)
    return (indexing + spec.images / spec.rows_staged) / 3600


def _node_rates(spec: IngestSpec) -> dict[str, float]:
    """Return the images/s of one node by limiting resource."""
    storage = spec.storage
    compute_s = 1 / spec.images_per_core
    latency_s = storage.latency_s / spec.images_per_shard / storage.requests_in_flight
    return {
        "cores" if compute_s >= latency_s else "latency": spec.cores / (compute_s + latency_s),
        "network": storage.node_bandwidth / (spec.image_bytes + spec.block_bytes),
    }


def _storage_rates(spec: IngestSpec) -> dict[str, float]:
    """Return the images/s that the request limits of the storage allow, by kind of request."""
    storage = spec.storage
    return {
        "GET requests": storage.gets_per_second * spec.prefixes * spec.images_per_shard,
        "PUT requests": storage.puts_per_second * spec.samples_per_block / 3,  # block, lengths and record
    }
