"""Images by URL: a server that fails in many ways costs its rows only, within limits, and gives reasons."""

import hashlib
import json
from collections.abc import Iterator

import pytest

from raylava.config.recipe import FetchConfig
from raylava.corpus import fetch
from raylava.corpus.fetch import UrlFetcher, fetched_content, is_url
from raylava.corpus.quarantine import BadRow
from tests.support.image_server import ImageServer

IMAGE = b"\x89PNG" + bytes(1000)
CONFIG = FetchConfig(timeout_s=1.0, retries=1, per_host=3, max_bytes=5000, allow_private_addresses=True)


@pytest.fixture(scope="module")
def server() -> Iterator[ImageServer]:
    server = ImageServer(IMAGE)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_FIRST_BACKOFF_S", 0.01)


def test_image_is_fetched_also_after_redirects(server: ImageServer) -> None:
    for path in ("/image.png", "/redirect/image.png", "/redirect/redirect/image.png", "/image.png?size=1&x=%20"):
        assert UrlFetcher(CONFIG).fetch(server.url + path).content == IMAGE
    assert server.requests["/image.png?size=1&x=%20"] == 1


@pytest.mark.parametrize(
    ("path", "problem", "requests"),
    [
        ("/status/404", "HTTP status 404", 1),
        ("/status/403", "HTTP status 403", 1),
        ("/status/500", "HTTP status 500, 2 times", 2),
        ("/status/429", "HTTP status 429, 2 times", 2),
        ("/empty", "the answer is empty", 1),
        ("/large", "more than max_bytes=5000", 1),
        ("/hangs", "ReadTimeoutError, 2 times", 2),
        ("/drips", "not complete after 1 s, 2 times", 2),
        ("/cut", "ProtocolError, 2 times", 2),
        ("/garbage", "ProtocolError, 2 times", 2),
        ("/hangs-up", "ProtocolError, 2 times", 2),
        ("/circle", "more than 5 redirects", 6),
        ("/to/ftp://example.com/a.png", "not an http(s) URL", 1),
        ("/to/file:///etc/passwd", "not an http(s) URL", 1),
    ],
)
def test_failure_is_a_result_with_its_reason(server: ImageServer, path: str, problem: str, requests: int) -> None:
    before = server.requests[path]
    result = UrlFetcher(CONFIG).fetch(server.url + path)
    assert result.content is None
    assert problem in result.problem
    assert server.requests[path] - before == requests


def test_failure_that_passes_is_repeated(server: ImageServer) -> None:
    assert UrlFetcher(CONFIG).fetch(f"{server.url}/once-503").content == IMAGE


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "[::1]", "0.0.0.0"])
def test_private_addresses_are_refused_without_a_request(host: str) -> None:
    config = CONFIG.model_copy(update={"allow_private_addresses": False})
    result = UrlFetcher(config).fetch(f"http://{host}/image.png")
    assert (result.content, "not public" in result.problem) == (None, True)


def test_redirect_to_a_private_address_is_refused(server: ImageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first host is taken for a public one, so that only the redirect is judged."""
    config = CONFIG.model_copy(update={"allow_private_addresses": False})
    address = UrlFetcher._address
    monkeypatch.setattr(
        UrlFetcher,
        "_address",
        lambda self, host, port: "127.0.0.1" if host == "public.example" else address(self, host, port),
    )
    port = server.url.rpartition(":")[2]
    before = server.requests["/image.png"]
    result = UrlFetcher(config).fetch(f"http://public.example:{port}/to/{server.url}/image.png")
    assert "not public" in result.problem
    assert server.requests["/image.png"] == before


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://a:99999/x", "http://\x00/", "https://exa mple/x", "http:///x"]
)
def test_malformed_url_is_a_result(url: str) -> None:
    assert UrlFetcher(CONFIG).fetch(url).content is None


def test_each_url_is_fetched_once_and_hosts_get_few_requests_at_a_time(server: ImageServer) -> None:
    server.most_open = 0
    urls = [f"{server.url}/slow{number}.png" for number in range(20)] * 2
    results = UrlFetcher(CONFIG).fetch_all(urls)
    assert {url: result.content for url, result in results.items()} == dict.fromkeys(urls, IMAGE)
    assert all(server.requests[f"/slow{number}.png"] == 1 for number in range(20))
    assert server.most_open <= 3


def test_record_has_the_hash_of_the_content_or_the_problem(server: ImageServer) -> None:
    fetcher = UrlFetcher(CONFIG)
    fetched, failed = (json.loads(fetcher.fetch(server.url + path).record()) for path in ("/a.png", "/status/404"))
    assert (fetched["sha256"], fetched["bytes"]) == (hashlib.sha256(IMAGE).hexdigest(), len(IMAGE))
    assert failed == {"url": f"{server.url}/status/404", "problem": "HTTP status 404"}


def test_signed_query_and_user_of_a_url_are_neither_recorded_nor_quarantined() -> None:
    url = "https://user:hunter2@host:99999/x.jpg?X-Amz-Signature=abc123"
    image = UrlFetcher(FetchConfig()).fetch(url)
    with pytest.raises(BadRow) as error:
        fetched_content(url, {url: image})
    for text in (image.record().decode(), error.value.detail):
        assert "https://…@host:99999/x.jpg?…" in text
        assert "hunter2" not in text
        assert "abc123" not in text


def test_urls_are_told_from_paths() -> None:
    assert [is_url(name) for name in ("https://a/b.png", "HTTP://a", "a/b.png", "s3://a/b", "httpfolder/a.png")] == [
        True, True, False, False, False,
    ]  # fmt: skip
