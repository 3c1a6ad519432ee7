"""Fetches images that rows name by URL (https://…), as LAION-type corpora do: bounded in time, size and concurrency.

A row must not reach into the network that preparation runs in: hosts with addresses that are not public are refused,
also after a redirect, and the connection goes to the address that was checked. A failure concerns its row only.
"""

import hashlib
import ipaddress
import json
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit, urlunsplit

import certifi
import urllib3

from raylava.config.recipe import FetchConfig
from raylava.corpus.quarantine import BadRow, Reason
from raylava.errors import redact_urls

_SCHEMES = {"http": 80, "https": 443}
_CHUNK = 64 << 10
_MAX_REDIRECTS = 5
_THREADS = 32  # of a fetcher
_RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_FIRST_BACKOFF_S = 0.5
_HEADERS = {"User-Agent": "raylava", "Accept": "image/*", "Accept-Encoding": "identity"}


def is_url(name: str) -> bool:
    """Return whether an image is named by an http or https URL."""
    return name.lower().startswith(("http://", "https://"))


@dataclass(frozen=True)
class FetchedImage:
    """The content that a URL had, or the reason why there is none."""

    url: str
    content: bytes | None
    problem: str = ""

    def record(self) -> bytes:
        """Return a JSON line with the URL, the size and the SHA-256 of the content, or the problem."""
        line: dict[str, str | int] = {"url": redact_urls(self.url)}
        if self.content is None:
            line["problem"] = redact_urls(self.problem)
        else:
            line |= {"bytes": len(self.content), "sha256": hashlib.sha256(self.content).hexdigest()}
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"


class UrlFetcher:
    """Fetches URLs with the recipe's limits. A worker has one at a time, for the shard that it prepares."""

    def __init__(self, config: FetchConfig) -> None:
        self.config = config
        self._hosts: defaultdict[str, threading.Semaphore] = defaultdict(lambda: threading.Semaphore(config.per_host))
        self._lock = threading.Lock()

    def fetch_all(self, urls: Iterable[str]) -> dict[str, FetchedImage]:
        """Fetch each URL once, many at the same time; return the results by URL."""
        distinct = list(dict.fromkeys(urls))
        if not distinct:
            return {}
        with ThreadPoolExecutor(min(_THREADS, len(distinct)), thread_name_prefix="fetch-image") as pool:
            return {image.url: image for image in pool.map(self.fetch, distinct)}

    def fetch(self, url: str) -> FetchedImage:
        """Fetch one URL, with retries; a failure is part of the result."""
        try:
            host = urlsplit(url).netloc
        except ValueError as error:
            return FetchedImage(url, None, f"not a URL: {error}")
        with self._lock:
            semaphore = self._hosts[host]
        with semaphore:
            for attempt in range(self.config.retries + 1):
                if attempt:
                    time.sleep(_FIRST_BACKOFF_S * 2 ** (attempt - 1))
                try:
                    return FetchedImage(url, self._follow(url))
                except _TemporaryError as error:
                    problem = str(error)
                except _FetchError as error:
                    return FetchedImage(url, None, str(error))
        return FetchedImage(url, None, f"{problem}, {self.config.retries + 1} times")

    def _follow(self, url: str) -> bytes:
        """Return the content behind a URL and its redirects. Raises _FetchError."""
        deadline = time.monotonic() + self.config.timeout_s
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._request(url, deadline)
            try:
                if response.status in (301, 302, 303, 307, 308):
                    url = _join(url, response.headers.get("Location", ""))
                    continue
                return self._read(response, deadline)
            finally:
                response.close()
        raise _FetchError(f"more than {_MAX_REDIRECTS} redirects")

    def _request(self, url: str, deadline: float) -> urllib3.BaseHTTPResponse:
        try:
            parts = urlsplit(url)
            port = parts.port or _SCHEMES.get(parts.scheme, 0)
        except ValueError as error:
            raise _FetchError(f"not an http(s) URL: {url[:100]}") from error
        if parts.scheme not in _SCHEMES or not parts.hostname:
            raise _FetchError(f"not an http(s) URL: {url[:100]}")
        address = self._address(parts.hostname, port)
        timeout = urllib3.Timeout(total=max(0.1, deadline - time.monotonic()))
        pool: urllib3.HTTPConnectionPool
        if parts.scheme == "https":
            pool = urllib3.HTTPSConnectionPool(
                address,
                port,
                server_hostname=parts.hostname,
                assert_hostname=parts.hostname,
                cert_reqs="CERT_REQUIRED",
                ca_certs=certifi.where(),
            )
        else:
            pool = urllib3.HTTPConnectionPool(address, port)
        target = urlunsplit(("", "", parts.path, parts.query, "")) or "/"
        headers = _HEADERS | {"Host": parts.netloc.rpartition("@")[2]}
        try:
            return pool.urlopen(
                "GET", target, headers=headers, retries=False, redirect=False, preload_content=False, timeout=timeout
            )
        except urllib3.exceptions.SSLError as error:
            raise _FetchError(f"its certificate was refused: {type(error).__name__}") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _TemporaryError(type(error).__name__) from error

    def _address(self, host: str, port: int) -> str:
        """Return the host's first address. Raises _FetchError unless all of its addresses are public."""
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise _TemporaryError(f"the host {host[:100]} has no address") from error
        addresses = [str(entry[4][0]) for entry in entries]
        private = [address for address in addresses if not ipaddress.ip_address(address.partition("%")[0]).is_global]
        if private and not self.config.allow_private_addresses:
            raise _FetchError(f"the host {host[:100]} has an address that is not public")
        return addresses[0]

    def _read(self, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
        """Return the body. Raises _FetchError for another status than 200, too many bytes or too little speed."""
        if response.status in _RETRIED_STATUSES:
            raise _TemporaryError(f"HTTP status {response.status}")
        if response.status != 200:
            raise _FetchError(f"HTTP status {response.status}")
        content = bytearray()
        try:
            while chunk := response.read1(_CHUNK, decode_content=False):  # what has arrived, so that time is checked
                content += chunk
                if len(content) > self.config.max_bytes:
                    raise _FetchError(f"more than max_bytes={self.config.max_bytes}")
                if time.monotonic() > deadline:
                    raise _TemporaryError(f"not complete after {self.config.timeout_s:g} s")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _TemporaryError(type(error).__name__) from error
        if not content:
            raise _FetchError("the answer is empty")
        return bytes(content)


def _join(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise _FetchError(f"a redirect to something that is no URL: {location[:100]}") from error


class _FetchError(Exception):
    """A failure that another attempt would repeat."""


class _TemporaryError(_FetchError):
    """A failure that another attempt may not repeat."""


def fetched_content(url: str, fetched: Mapping[str, FetchedImage]) -> bytes:
    """Return the content of a URL among those fetched. Raises BadRow with the reason when there is none."""
    image = fetched[url]
    if image.content is None:
        raise BadRow(Reason.IMAGE_NOT_FETCHED, f"{redact_urls(url)[:300]}: {redact_urls(image.problem)}")
    return image.content
