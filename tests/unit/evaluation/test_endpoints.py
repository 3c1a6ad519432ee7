"""Endpoints share the questions, with bounded concurrency; temporary failures are retried, any other ends the run."""

import functools
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raylava.cli import main
from raylava.errors import RunError, UserError
from raylava.evaluation.endpoint_generation import RetryPolicy, generate_with_endpoints
from raylava.evaluation.endpoint_options import EndpointOptions
from raylava.evaluation.endpoints import KEY_VARIABLE, RemoteEndpoints, find_served_model, parse_urls
from raylava.evaluation.engines import PromptBuilder
from raylava.evaluation.generation import ActorPool, GenerationConfig
from raylava.evaluation.prediction_store import PredictionStore
from raylava.evaluation.questions import GeneratedAnswer, Question
from raylava.models.registry import LlavaCheckpoint
from raylava.pipeline import evaluation
from raylava.progress import NullProgressBar, ProgressBar
from raylava.storage import storage_path
from tests.support.chat_server import ANSWER, PATIENCE_S, ChatRequest, ChatServer, Failure

KEY = "planted-endpoint-key"
THREE_ATTEMPTS = RetryPolicy(attempts=3, first_delay_s=0.01)
NO_MODEL = GenerationConfig(LlavaCheckpoint("unused"), "", max_new_tokens=7)
NO_PROGRESS = NullProgressBar()
StartServer = Callable[..., ChatServer]


@pytest.fixture
def start() -> Iterator[StartServer]:
    """Starts servers that end with the test."""
    servers: list[ChatServer] = []

    def start_server(*arguments: Any, **settings: Any) -> ChatServer:
        servers.append(ChatServer(*arguments, **settings))
        return servers[-1]

    yield start_server
    for server in servers:
        server.close()


def make_questions(count: int) -> list[Question]:
    return [Question(str(number), None, f"What is {number}?", "all", ("x",)) for number in range(count)]


def generate(
    questions: list[Question],
    *servers: ChatServer,
    concurrency: int = 1,
    config: GenerationConfig = NO_MODEL,
    store: PredictionStore | None = None,
    progress: ProgressBar = NO_PROGRESS,
) -> list[GeneratedAnswer]:
    source = RemoteEndpoints("toy", concurrency, tuple(server.url for server in servers))
    return generate_with_endpoints(questions, config, source, ActorPool(), progress, store, THREE_ATTEMPTS)


class SenderCount(NullProgressBar):
    """Counts the threads that send requests when the first result is reported."""

    def __init__(self) -> None:
        self._others = set(threading.enumerate())
        self._reported = threading.Event()
        self.at_first_result = 0

    def update(self, done: float, total: float, **metrics: float) -> None:
        if not self._reported.is_set():
            new = set(threading.enumerate()) - self._others
            self.at_first_result = sum(thread.name == "ask-endpoint" for thread in new)
            self._reported.set()

    def await_first_result(self) -> None:
        assert self._reported.wait(PATIENCE_S)


def repeat(request: ChatRequest) -> str:
    return f" {request.question} "


def test_answers_are_stripped_and_in_the_order_of_the_questions(start: StartServer) -> None:
    server = start(repeat)
    answers = generate(make_questions(20), server, concurrency=4)
    assert [(answer.question_id, answer.text) for answer in answers] == [(str(n), f"What is {n}?") for n in range(20)]
    assert {(request.model, request.max_tokens, request.temperature) for request in server.requests} == {("toy", 7, 0)}


def test_request_holds_the_pixels_of_the_image_and_the_conversation_before_the_question(
    start: StartServer, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    question = Question("1", "a.png", "And now?", "all", ("x",), (("What is it?", "a kite"),))
    server = start(repeat)
    config = GenerationConfig(LlavaCheckpoint("unused"), str(tmp_path), prompt_suffix="\nOne word.")
    (answer,) = generate([question], server, config=config)
    (request,) = server.requests
    assert request.image is not None
    assert np.array_equal(np.asarray(request.image), pixels)
    assert (request.history, request.question) == ((("What is it?", "a kite"),), "And now?\nOne word.")
    assert answer.prompt == "And now?\nOne word."


def test_blank_image_has_the_size_of_the_image_and_the_mean_color(
    start: StartServer, untrained_llava: Path, tmp_path: Path
) -> None:
    image = Image.fromarray(np.full((24, 40, 3), 200, np.uint8))
    image.save(tmp_path / "a.png")
    model = LlavaCheckpoint(str(untrained_llava))
    server = start()
    config = GenerationConfig(model, str(tmp_path), blank_images=True)
    generate([Question("1", "a.png", "What?", "all", ("x",))], server, config=config)
    blank = server.requests[0].image
    assert blank is not None
    assert np.array_equal(np.asarray(blank), np.asarray(PromptBuilder(model).blank_image(image)))


def test_question_with_an_unreadable_image_is_not_sent(start: StartServer, tmp_path: Path) -> None:
    server = start()
    config = GenerationConfig(LlavaCheckpoint("unused"), str(tmp_path))
    (answer,) = generate([Question("1", "absent.png", "What?", "all", ("x",))], server, config=config)
    assert answer.text is None
    assert answer.problem
    assert not server.requests


def test_as_many_requests_are_open_as_the_concurrency_allows(start: StartServer) -> None:
    """Each open request has a thread. All are running at the first result, that of a question without an image file."""
    senders = SenderCount()
    server = start(lambda request: senders.await_first_result() or server.await_open_requests(4) or ANSWER)
    questions = [Question("unreadable", "absent.png", "What?", "all", ("x",)), *make_questions(30)]
    generate(questions, server, concurrency=4, progress=senders)
    assert (senders.at_first_result, server.most_open) == (4, 4)


def test_idle_endpoint_takes_the_questions_of_a_slow_one(start: StartServer) -> None:
    fast = start()
    slow = start(lambda request: fast.await_requests(9) or ANSWER)
    generate(make_questions(10), slow, fast)
    assert (len(slow.requests), len(fast.requests)) == (1, 9)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_temporary_failure_is_retried(status: int, start: StartServer) -> None:
    server = start(failures=(Failure(status), Failure(status, headers=(("Retry-After", "0"),))))
    assert [answer.text for answer in generate(make_questions(2), server)] == [ANSWER] * 2
    assert len(server.requests) == 4


def test_retry_waits_longer_each_time_and_at_least_as_long_as_the_server_requests() -> None:
    policy = RetryPolicy(first_delay_s=1.0, max_delay_s=10.0)
    for attempt, longest in [(1, 1.0), (2, 2.0), (3, 4.0), (9, 10.0)]:
        assert longest / 2 <= policy.delay(attempt, 0.0) <= longest
    assert policy.delay(1, 7.0) == 7.0
    assert policy.delay(1, 3600.0) == 10.0


@pytest.mark.parametrize("status", [302, 400, 404])
def test_refused_request_ends_the_run_at_once_with_the_first_line_of_the_response(
    status: int, start: StartServer
) -> None:
    server = start(failures=(Failure(status, "the context is too long\nTraceback"),))
    with pytest.raises(RunError) as error:
        generate(make_questions(1), server)
    expected = f"question 0: {server.url}: refused a request with status {status}: the context is too long"
    assert str(error.value) == expected
    assert len(server.requests) == 1


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"choices": []}', '{"choices": [{"message": {"content": 3}}]}'])
def test_response_that_is_no_chat_completion_ends_the_run(content: str, start: StartServer) -> None:
    server = start(failures=(Failure(200, content),))
    with pytest.raises(RunError, match="the response is no chat completion"):
        generate(make_questions(1), server)


def test_questions_of_an_endpoint_that_dies_go_to_the_others(
    start: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    mortal, survivor = start(repeat, dies_after=3), start(lambda request: mortal.await_requests(3) or repeat(request))
    with caplog.at_level(logging.WARNING):
        answers = generate(make_questions(20), mortal, survivor, concurrency=2)
    assert [answer.text for answer in answers] == [f"What is {number}?" for number in range(20)]
    (warning,) = caplog.messages
    assert warning.startswith(f"{mortal.url}: no answer to question ")
    assert warning.endswith("; the other endpoints answer its questions")


def test_question_that_two_endpoints_do_not_answer_ends_the_run_while_others_are_left(start: StartServer) -> None:
    """Otherwise one such question would use up all endpoints, and again in the next run."""
    servers = [start(failures=(Failure(500),) * 9) for _ in range(3)]
    questions = make_questions(1)
    with pytest.raises(RunError, match=r"no answer to question 0 .*; another endpoint gave none either"):
        generate(questions, *servers)


def test_run_whose_endpoints_all_die_keeps_the_answers_and_resumes_with_the_missing_questions(
    start: StartServer, tmp_path: Path
) -> None:
    questions = make_questions(10)
    store = PredictionStore(storage_path(tmp_path))
    with pytest.raises(RunError, match=r"^http://.* \(.*\); start the server, and re-run the same command to resume$"):
        generate(questions, start(dies_after=3), start(dies_after=2), store=store)
    stored = PredictionStore(storage_path(tmp_path))
    assert len(stored.predictions) == 5
    server = start()
    answers = generate(questions, server, store=stored)
    assert [answer.question_id for answer in answers] == [question.question_id for question in questions]
    assert len(server.requests) == 5


def test_interrupted_command_has_status_1_and_resumes_on_another_server_without_ray(
    start: StartServer,
    untrained_llava: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick = functools.partial(generate_with_endpoints, retry=THREE_ATTEMPTS)
    monkeypatch.setattr(evaluation, "generate_with_endpoints", quick)
    monkeypatch.delattr(evaluation, "ray_session")
    questions = [{"question_id": number, "text": "What?", "answer": ANSWER} for number in range(10)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    command = ["evaluate", str(untrained_llava), "--benchmark", "custom", "--data", str(tmp_path / "q.jsonl")]
    command += ["--storage", str(tmp_path / "storage"), "--json", "--concurrency", "1", "--endpoint"]
    assert main([*command, start(dies_after=4).url]) == 1
    output, error = capfd.readouterr()
    assert output == ""
    assert "start the server, and re-run the same command to resume" in " ".join(error.split())
    server = start()
    assert main([*command, server.url]) == 0
    assert json.loads(capfd.readouterr().out)["metrics"]["scores"]["exact_match"]["value"] == 1.0
    assert len(server.requests) == 6


def test_no_request_is_sent_when_all_answers_are_stored(start: StartServer, tmp_path: Path) -> None:
    store = PredictionStore(storage_path(tmp_path))
    store.add([GeneratedAnswer("0", "What is 0?", "stored")])
    store.flush()
    server = start()
    (answer,) = generate(make_questions(1), server, store=PredictionStore(storage_path(tmp_path)))
    assert (answer.text, server.requests) == ("stored", [])


def test_key_is_sent_as_a_bearer_token_and_quoted_in_no_message(
    start: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server = start(key=KEY)
    generate(make_questions(1), server)
    assert server.requests[0].key == KEY
    with pytest.raises(RunError, match=r"refused a request with status 401: Incorrect API key provided: \[key\]"):
        generate(make_questions(1), start(key="another"))
    with pytest.raises(UserError, match=r"status 401: .*; check the URL and RAYLAVA_ENDPOINT_KEY") as error:
        find_served_model([start(key="another").url], None)
    assert KEY not in caplog.text + str(error.value)


def test_key_that_no_header_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "two\nlines")
    with pytest.raises(UserError, match=r"^RAYLAVA_ENDPOINT_KEY: contains characters that no HTTP header can hold"):
        EndpointOptions(("http://host/v1",)).validate("auto", None, 0)


def test_served_model_is_the_only_one_that_the_endpoints_list(start: StartServer) -> None:
    servers = [start(models=models) for models in (("toy",), ("toy",), ("a", "b"), ())]
    urls = [server.url for server in servers]
    assert find_served_model(urls[:2], None) == "toy"
    assert find_served_model(urls[2:], "b") == "b"
    with pytest.raises(UserError, match=r"--served-model: not given, .*; give one of: a, b, toy$"):
        find_served_model(urls[1:3], None)
    with pytest.raises(UserError, match="which the endpoints do not list"):
        find_served_model(urls[3:], None)


def test_endpoints_that_do_not_respond_are_named_when_their_model_is_looked_up(start: StartServer) -> None:
    server = start()
    server.close()
    with pytest.raises(
        RunError, match=rf"^no endpoint lists its models \({server.url}: .*refused.*--served-model NAME"
    ):
        find_served_model([server.url], None)
    assert find_served_model([server.url, start().url], None) == "toy"


def test_urls_are_distinct_and_have_no_trailing_slash() -> None:
    assert parse_urls(["http://a/v1/", "http://a/v1", "https://b:8000/v1"]) == ("http://a/v1", "https://b:8000/v1")
