"""What preparing a corpus takes: hours and nodes for so many images, and requests that the object store admits.

Pure. Assumptions are fields of `Ingest`; the rate of a core is measured here (`jobs/bench/prepare.py`) or given.
"""

import math
from dataclasses import dataclass

IMAGES_PER_CORE = 100.0  # a second: decode 640×480 JPEG, pad, resize to 336, encode (jobs/bench/README.md, one core)
_LIST_PAGE = 1_000  # keys that one LIST request returns (S3)
MANY = 1_000_000  # nodes, where nothing but their number limits them


@dataclass(frozen=True)
class Store:
    """An object store's limits: requests a second for each prefix (S3's documented 5,500 GET and 3,500 PUT), bytes/s of
    a node, seconds until the first byte, requests that one core keeps in flight.
    """

    gets: float = 5_500
    puts: float = 3_500
    lists: float = 5_500
    node_bytes: float = 1.25e9
    latency: float = 0.03
    in_flight: int = 1

    @classmethod
    def disk(cls) -> "Store":
        """A folder that every node has: no requests to count, nothing to wait for."""
        return cls(gets=math.inf, puts=math.inf, lists=math.inf, node_bytes=2e9, latency=0.0)


@dataclass(frozen=True)
class Ingest:
    """Preparing so many images on nodes of so many cores. `image_bytes` is a source file's, `block_bytes` a
    prepared one's; `shard` images come with one request where the source is packed (WebDataset, Parquet), else 1.
    """

    images: int
    cores: int = 64
    images_per_core: float = IMAGES_PER_CORE
    image_bytes: float = 150e3
    block_bytes: float = 79e3
    samples_per_block: int = 2048
    shard: int = 1
    prefixes: int = 1
    store: Store = Store()


@dataclass(frozen=True)
class IngestPlan:
    """`rate` in images/s of `nodes` nodes, `bound` what holds it there. `listing` in hours, where files are single;
    training reads paths from the annotations and never lists, so it matters to those who must list to write them.
    `nodes_at_most` is how many nodes the store feeds before it says 503.
    """

    nodes: int
    rate: float
    hours: float
    bound: str
    node_hours: float
    requests: float
    requests_per_second: float
    listing: float
    stored: float
    nodes_at_most: int


def plan(ingest: Ingest, nodes: int | None = None, within_hours: float = 24.0) -> IngestPlan:
    """For so many nodes, or for as few as end within so many hours and the store's limits."""
    own = _node_rates(ingest)
    bound_alone = min(own, key=lambda name: own[name])
    node = own[bound_alone]
    limit = _store_rates(ingest)
    bound_store = min(limit, key=lambda name: limit[name])
    most = int(min(limit[bound_store] / node, MANY))
    wanted = nodes or min(max(1, most), max(1, -(-int(ingest.images) // max(1, int(node * within_hours * 3600)))))
    rate = min(wanted * node, limit[bound_store])
    hours = ingest.images / rate / 3600
    requests = ingest.images / ingest.shard + ingest.images / ingest.samples_per_block
    return IngestPlan(
        nodes=wanted,
        rate=rate,
        hours=hours,
        bound=bound_alone if wanted * node <= limit[bound_store] else bound_store,
        node_hours=hours * wanted,
        requests=requests,
        requests_per_second=requests / hours / 3600,
        listing=ingest.images / ingest.shard / _LIST_PAGE / min(10.0, ingest.store.lists) / 3600,
        stored=ingest.images * ingest.block_bytes,
        nodes_at_most=max(1, most),
    )


def _node_rates(ingest: Ingest) -> dict[str, float]:
    """Images/s that a node can do, by what may hold it back."""
    store = ingest.store
    computing, waiting = 1 / ingest.images_per_core, store.latency / ingest.shard / store.in_flight
    return {
        "cores" if computing >= waiting else "latency": ingest.cores / (computing + waiting),
        "network": store.node_bytes / (ingest.image_bytes + ingest.block_bytes),
    }


def _store_rates(ingest: Ingest) -> dict[str, float]:
    """Images/s that the store's request limits admit."""
    store = ingest.store
    return {
        "GET requests": store.gets * ingest.prefixes * ingest.shard,
        "PUT requests": store.puts * ingest.samples_per_block / 3,  # a block, its lengths, its record
    }
