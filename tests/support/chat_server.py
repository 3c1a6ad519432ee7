"""An OpenAI-compatible chat server on a loopback port, with the failures of real ones; also run as a program.

As a program it takes the arguments of `vllm serve` that raylava passes, and answers every question with `ANSWER`.
"""

import argparse
import base64
import io
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

ANSWER = "an answer"
PATIENCE_S = 60.0


@dataclass(frozen=True)
class ChatRequest:
    """A request as the server received it. `image` is that of the first message."""

    model: str
    question: str
    image: Image.Image | None
    history: tuple[tuple[str, str], ...]
    max_tokens: int
    temperature: float
    key: str


@dataclass(frozen=True)
class Failure:
    """A response instead of an answer."""

    status: int
    body: str = "the server is busy\nand says more"
    headers: tuple[tuple[str, str], ...] = ()


class ChatServer:
    """Answers with `answer`, after the `failures` that it is given; drops connections after `dies_after` answers."""

    def __init__(
        self,
        answer: Callable[[ChatRequest], str] = lambda request: ANSWER,
        models: tuple[str, ...] = ("toy",),
        failures: tuple[Failure, ...] = (),
        dies_after: int | None = None,
        key: str = "",
        port: int = 0,
    ) -> None:
        self.models, self.requests, self.most_open = models, list[ChatRequest](), 0
        self._answer, self._failures, self._dies_after, self._key = answer, list(failures), dies_after, key
        self._open = self._answered = 0
        self._changed = threading.Condition()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path == "/health":
                    server._send(self, 200, "")
                elif server._is_allowed(self) and self.path == "/v1/models":
                    server._send(self, 200, json.dumps({"data": [{"id": model} for model in server.models]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if server._is_allowed(self):
                    server._chat(self, body)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Do nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def await_open_requests(self, count: int) -> None:
        """Hold a request until at least `count` have been open at the same time."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.most_open >= count, PATIENCE_S)

    def await_requests(self, count: int) -> None:
        """Hold a request of another server until this one has received `count`."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.requests) >= count, PATIENCE_S)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _is_allowed(self, handler: BaseHTTPRequestHandler) -> bool:
        key = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        if self._key and key != self._key:
            self._send(handler, 401, f"Incorrect API key provided: {key}")
            return False
        return True

    def _chat(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        request = _parse(body, handler.headers.get("Authorization", ""))
        with self._changed:
            if self._dies_after is not None and self._answered >= self._dies_after:
                handler.close_connection = True
                return
            self.requests.append(request)
            failure = self._failures.pop(0) if self._failures else None
            self._open += 1
            self.most_open = max(self.most_open, self._open)
            self._changed.notify_all()
        text = "" if failure else self._answer(request)
        with self._changed:
            self._open -= 1
            self._answered += not failure
        if failure:
            self._send(handler, failure.status, failure.body, dict(failure.headers))
        else:
            message = {"role": "assistant", "content": text}
            self._send(handler, 200, json.dumps({"choices": [{"index": 0, "message": message}]}))

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, body: str, headers: dict[str, str] | None = None
    ) -> None:
        content = body.encode()
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)


def _parse(body: dict[str, Any], authorization: str) -> ChatRequest:
    """Check the form of a request and return what it asks."""
    *earlier, (last, _) = _turns(body["messages"])
    texts = [text for text, _ in earlier]
    answers = [message["content"] for message in body["messages"] if message["role"] == "assistant"]
    images = [image for _, image in [*earlier, (last, _)] if image]
    assert len(images) <= 1
    return ChatRequest(
        body["model"],
        last,
        images[0] if images else None,
        tuple(zip(texts, answers, strict=True)),
        body["max_tokens"],
        body["temperature"],
        authorization.removeprefix("Bearer "),
    )


def _turns(messages: list[dict[str, Any]]) -> list[tuple[str, Image.Image | None]]:
    """Return text and image of each message of the user; the image comes before the text."""
    turns = []
    for message in messages:
        if message["role"] == "user":
            *images, text = message["content"]
            assert text["type"] == "text"
            turns.append((text["text"], _decode(images[0]["image_url"]["url"]) if images else None))
    return turns


def _decode(url: str) -> Image.Image:
    prefix, content = url.split(",")
    assert prefix == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def main() -> None:
    import os

    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments, _ = parser.parse_known_args()
    assert arguments.host == "127.0.0.1"
    ChatServer(models=(arguments.served_model_name,), key=os.environ["VLLM_API_KEY"], port=arguments.port)
    threading.Event().wait()


if __name__ == "__main__":
    main()
