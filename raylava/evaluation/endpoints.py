"""Client of OpenAI-compatible servers: the URLs of their APIs, the models that they serve, and one chat completion.

The API key is the value of RAYLAVA_ENDPOINT_KEY. It is sent as a bearer token, and is part of no message or record.
"""

import base64
import contextlib
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from urllib.parse import urlsplit

import certifi
import urllib3

from raylava.errors import RunError, UserError, first_line, redact_urls

if TYPE_CHECKING:
    from raylava.evaluation.engines import Exchange
    from raylava.evaluation.generation import ActorPool, GenerationConfig

KEY_VARIABLE = "RAYLAVA_ENDPOINT_KEY"
DEFAULT_CONCURRENCY = 16
_TIMEOUT = urllib3.Timeout(connect=10.0, read=600.0)  # an answer may wait in the server's queue
_RETRIED_STATUSES = (408, 429)  # and every 5xx
_MAX_MESSAGE = 300  # characters of a response that an error message quotes


class EndpointUnavailable(Exception):
    """A request that failed for the moment: no connection, or a status that asks for another attempt."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Reply:
    """The response to a request. `retry_after_s` is what the server asks to wait before the next attempt."""

    status: int
    body: bytes
    retry_after_s: float = 0.0


class Endpoint(Protocol):
    """An OpenAI-compatible API. `name` identifies it in messages."""

    name: str

    def request(self, method: str, path: str, body: bytes | None = None) -> Reply:
        """Send a request to `path` below the API's URL. Raises EndpointUnavailable when there is no response."""


@dataclass(frozen=True)
class EndpointSource(ABC):
    """The endpoints of an evaluation. Each serves `served_model`, and has up to `concurrency` requests open."""

    served_model: str
    concurrency: int
    needs_ray: ClassVar[bool]  # whether a Ray session must exist while they are open

    @abstractmethod
    def fingerprint_fields(self) -> dict[str, Any]:
        """Return what determines the answers, which does not include where the endpoints are."""

    @abstractmethod
    def open(
        self, config: "GenerationConfig", actors: "ActorPool"
    ) -> "contextlib.AbstractContextManager[Sequence[Endpoint]]":
        """Return a context in which the endpoints answer."""


@dataclass(frozen=True)
class RemoteEndpoints(EndpointSource):
    """Running servers, by the URLs of their APIs."""

    urls: tuple[str, ...]
    needs_ray = False

    def fingerprint_fields(self) -> dict[str, Any]:
        """See EndpointSource."""
        return {"served_model": self.served_model}

    @contextlib.contextmanager
    def open(self, config: "GenerationConfig", actors: "ActorPool") -> Iterator[Sequence[Endpoint]]:
        """See EndpointSource."""
        key = read_key()
        yield [HttpEndpoint(url, key, self.concurrency) for url in self.urls]


class HttpEndpoint:
    """An API at a URL such as http://127.0.0.1:8000/v1. May be used by several threads."""

    def __init__(self, url: str, key: str = "", max_connections: int = DEFAULT_CONCURRENCY) -> None:
        self.name = url
        self._key = key
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._connections = urllib3.PoolManager(
            maxsize=max_connections, timeout=_TIMEOUT, cert_reqs="CERT_REQUIRED", ca_certs=certifi.where()
        )

    def request(self, method: str, path: str, body: bytes | None = None) -> Reply:
        """See Endpoint. Redirects are not followed, since they would pass the key on."""
        try:
            response = self._connections.request(
                method, self.name + path, body=body, headers=self._headers, retries=False, redirect=False
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise EndpointUnavailable(first_line(error)) from error
        content = response.data
        if self._key and response.status != 200:  # some servers quote the key that they refuse
            content = content.replace(self._key.encode(), b"[key]")
        return Reply(response.status, content, _parse_seconds(response.headers.get("Retry-After", "")))


def parse_urls(urls: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct URLs of --endpoint without trailing slash. Raises UserError for one that cannot be used."""
    return tuple(dict.fromkeys(_parse_url(url) for url in urls))


def _parse_url(url: str) -> str:
    shown = f"--endpoint {re.split('[?#]', redact_urls(url))[0]}"  # a query may hold a key
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        raise UserError(f"{shown}: not a URL; give one such as http://127.0.0.1:8000/v1") from None
    if "@" in parts.netloc:
        raise UserError(f"{shown}: contains a user or password; remove it, and give a key as {KEY_VARIABLE}")
    if parts.scheme not in ("http", "https") or not parts.hostname or not has_port or not url.isprintable():
        raise UserError(f"{shown}: not a URL; give one such as http://127.0.0.1:8000/v1")
    if parts.query or parts.fragment:
        raise UserError(f"{shown}: has a query or fragment; remove it, and give a key as {KEY_VARIABLE}")
    return url.rstrip("/")


def read_key() -> str:
    """Return the API key of the environment, empty if there is none. Raises UserError for one that cannot be sent."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY_VARIABLE}: contains characters that no HTTP header can hold; set it again")
    return key


def find_served_model(urls: Sequence[str], served_model: str | None) -> str:
    """Return the name under which the endpoints serve the model: the given one, or else the only one that they list.

    Raises UserError when they list none or several, and RunError when none of them responds.
    """
    if served_model:
        return served_model
    key, names, problems = read_key(), set[str](), list[str]()
    for url in urls:
        try:
            names |= _list_models(HttpEndpoint(url, key))
        except EndpointUnavailable as problem:
            problems.append(f"{url}: {problem}")
    if not names and problems:
        raise RunError(f"no endpoint lists its models ({'; '.join(problems)}); start one, or give --served-model NAME")
    if len(names) != 1:
        choices = f"one of: {', '.join(sorted(names))}" if names else "which the endpoints do not list"
        raise UserError(f"--served-model: not given, and not exactly one model is served; give {choices}")
    return names.pop()


def _list_models(endpoint: Endpoint) -> set[str]:
    """Return the names of the models that an endpoint serves."""
    reply = endpoint.request("GET", "/models")
    _raise_if_temporary(reply)
    try:
        problem = "" if reply.status == 200 else describe(reply)
        names = set() if problem else {str(model["id"]) for model in json.loads(reply.body)["data"]}
    except (ValueError, LookupError, TypeError) as error:
        problem = first_line(error)
    if problem:
        raise UserError(
            f"--endpoint {endpoint.name}: does not list its models ({problem}); check the URL and {KEY_VARIABLE}, or "
            "give --served-model NAME"
        )
    return names


def chat_request(model: str, conversation: Iterable["Exchange"], max_new_tokens: int) -> bytes:
    """Return the body of a request for the answer that the last exchange lacks, decoded greedily."""
    messages: list[dict[str, Any]] = []
    for exchange in conversation:
        images = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in exchange.images]
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": exchange.question}]})
        if exchange.answer is not None:
            messages.append({"role": "assistant", "content": exchange.answer})
    settings = {"model": model, "temperature": 0, "max_tokens": max_new_tokens}
    return json.dumps(settings | {"messages": messages}).encode()


def complete_chat(endpoint: Endpoint, body: bytes) -> str:
    """Return the answer to a chat request.

    Raises EndpointUnavailable for a failure that another attempt may not have, RunError for any other.
    """
    reply = endpoint.request("POST", "/chat/completions", body)
    _raise_if_temporary(reply)
    if reply.status != 200:
        raise RunError(f"{endpoint.name}: refused a request with {describe(reply)}")
    try:
        content = json.loads(reply.body)["choices"][0]["message"]["content"]
        return "" if content is None else str.strip(content)
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(f"{endpoint.name}: the response is no chat completion ({first_line(error)})") from error


def _raise_if_temporary(reply: Reply) -> None:
    if reply.status in _RETRIED_STATUSES or reply.status >= 500:
        raise EndpointUnavailable(describe(reply), reply.retry_after_s)


def describe(reply: Reply) -> str:
    """Return the status of a response and the first line of its body."""
    lines = reply.body.decode(errors="replace").strip().splitlines()
    return f"status {reply.status}" + (f": {redact_urls(lines[0])[:_MAX_MESSAGE]}" if lines else "")


def _data_url(image: Any) -> str:
    """Return an image as a PNG, so that the server decodes the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _parse_seconds(value: str) -> float:
    """Return a Retry-After header in seconds, 0 if it is missing or a date."""
    return float(value) if value.isascii() and value.isdigit() else 0.0
