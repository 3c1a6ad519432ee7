"""Generation by OpenAI-compatible servers: endpoints share the questions, and each has a number of requests open.

Threads of this process send the requests, one for each that may be open. An idle thread takes the next question, so
that faster endpoints answer more of them. An endpoint that fails repeatedly is given up; the others answer its
questions.
"""

import logging
import queue
import random
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from raylava.corpus.quarantine import BadRow
from raylava.errors import RunError, UserError, first_line
from raylava.evaluation.endpoints import Endpoint, EndpointSource, EndpointUnavailable, chat_request, complete_chat
from raylava.evaluation.engines import PromptBuilder, build_conversation
from raylava.evaluation.generation import ActorPool, GenerationConfig, collect_answers, load_image
from raylava.evaluation.prediction_store import PredictionStore
from raylava.evaluation.questions import GeneratedAnswer, Question
from raylava.progress import ProgressBar
from raylava.storage import storage_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """Attempts at a request, and the delay before the next one, which doubles with each."""

    attempts: int = 8
    first_delay_s: float = 0.5
    max_delay_s: float = 30.0

    def delay(self, attempt: int, requested_s: float) -> float:
        """Return the seconds to wait after failed attempt `attempt` (from 1): at least what the server requested.

        The delay is random between half and all of its length, so that the threads do not retry at the same time.
        """
        longest = min(self.max_delay_s, self.first_delay_s * 2 ** (attempt - 1))
        return max(random.uniform(longest / 2, longest), min(requested_s, self.max_delay_s))


DEFAULT_RETRY_POLICY = RetryPolicy()


def generate_with_endpoints(
    questions: list[Question],
    config: GenerationConfig,
    source: EndpointSource,
    actors: ActorPool,
    progress: ProgressBar,
    store: PredictionStore | None = None,
    retry: RetryPolicy = DEFAULT_RETRY_POLICY,
) -> list[GeneratedAnswer]:
    """Return one answer per question, in question order, like generate_answers.

    Raises RunError when an endpoint refuses a request, or all have failed; the answers until then are stored.
    """

    def generate(unanswered: list[Question]) -> Iterator[list[GeneratedAnswer]]:
        if unanswered:
            with source.open(config, actors) as endpoints:
                yield from _Dispatcher(unanswered, config, source, endpoints, retry).run()

    return collect_answers(questions, generate, progress, store)


@dataclass
class _EndpointState:
    """An endpoint of a running evaluation. `stopped` is set when it has failed, and when the evaluation ends."""

    endpoint: Endpoint
    stopped: threading.Event = field(default_factory=threading.Event)


class _Dispatcher:
    """Distributes the questions over the endpoints' threads and collects the answers."""

    def __init__(
        self,
        questions: Sequence[Question],
        config: GenerationConfig,
        source: EndpointSource,
        endpoints: Sequence[Endpoint],
        retry: RetryPolicy,
    ) -> None:
        self._config, self._source, self._retry = config, source, retry
        self._image_root = storage_path(config.image_root)
        self._blank_image = PromptBuilder(config.model).blank_image if config.blank_images else None
        self._states = [_EndpointState(endpoint) for endpoint in endpoints]
        self._changed = threading.Condition()  # guards the two below and the states; its lock is reentrant
        self._waiting = deque(questions)
        self._unfinished = len(questions)
        self._unanswered: set[str] = set()  # questions to which an endpoint that was given up has no answer
        self._results: queue.SimpleQueue[GeneratedAnswer | Exception] = queue.SimpleQueue()

    def run(self) -> Iterator[list[GeneratedAnswer]]:
        """Yield the answers in order of completion. Raises the first error that another attempt cannot avoid."""
        count = self._unfinished
        try:
            for state in self._states:
                for _ in range(min(self._source.concurrency, count)):
                    threading.Thread(target=self._serve, args=(state,), name="ask-endpoint", daemon=True).start()
            for _ in range(count):
                result = self._results.get()
                if isinstance(result, Exception):
                    raise result
                yield [result]
        finally:
            self._stop(self._states)

    def _serve(self, state: _EndpointState) -> None:
        """Have an endpoint answer one question after another, until there is none left or the endpoint has failed."""
        while question := self._take(state):
            try:
                answer = self._answer(state, question)
            except EndpointUnavailable as problem:
                self._give_up(state, question, problem)
            except (UserError, RunError) as error:
                self._results.put(type(error)(f"question {question.question_id}: {error}"))
            except Exception as error:
                logger.error("question %s failed", question.question_id, exc_info=error)
                self._results.put(RunError(f"question {question.question_id}: {first_line(error)}"))
            else:
                self._results.put(answer)
                self._finish()

    def _take(self, state: _EndpointState) -> Question | None:
        """Wait for a question. Return None when all are answered, or the endpoint is stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._unfinished or state.stopped.is_set())
            return self._waiting.popleft() if self._waiting and not state.stopped.is_set() else None

    def _finish(self) -> None:
        with self._changed:
            self._unfinished -= 1
            if not self._unfinished:
                self._changed.notify_all()

    def _give_up(self, state: _EndpointState, question: Question, problem: EndpointUnavailable) -> None:
        """Stop an endpoint that has failed, and leave the question to the others."""
        with self._changed:
            self._waiting.appendleft(question)
            self._changed.notify_all()
            if state.stopped.is_set():
                return  # another thread has given it up, or the evaluation has ended
            self._stop([state])
            others = [other for other in self._states if not other.stopped.is_set()]
            failed_before = question.question_id in self._unanswered
            self._unanswered.add(question.question_id)
        message = f"{state.endpoint.name}: no answer to question {question.question_id} ({problem})"
        if others and failed_before:  # the question, not the endpoints
            self._results.put(RunError(f"{message}; another endpoint gave none either"))
        elif others:
            logger.warning("%s; the other endpoints answer its questions", message)
        else:
            self._results.put(RunError(f"{message}; start the server, and re-run the same command to resume"))

    def _stop(self, states: Sequence[_EndpointState]) -> None:
        with self._changed:
            for state in states:
                state.stopped.set()
            self._changed.notify_all()

    def _answer(self, state: _EndpointState, question: Question) -> GeneratedAnswer:
        """Answer a question; one whose image cannot be loaded gets a problem instead of a text."""
        prompt = question.text + self._config.prompt_suffix
        image = load_image(self._image_root, question, self._blank_image)
        if isinstance(image, BadRow):
            return GeneratedAnswer(question.question_id, prompt, None, str(image))
        conversation = build_conversation(prompt, image, question.history)
        body = chat_request(self._source.served_model, conversation, self._config.max_new_tokens)
        return GeneratedAnswer(question.question_id, prompt, self._complete(state, body))

    def _complete(self, state: _EndpointState, body: bytes) -> str:
        """Return the answer to a request, after several attempts if need be. Raises EndpointUnavailable."""
        for attempt in range(1, self._retry.attempts):
            try:
                return complete_chat(state.endpoint, body)
            except EndpointUnavailable as problem:
                if state.stopped.wait(self._retry.delay(attempt, problem.retry_after_s)):
                    raise
        return complete_chat(state.endpoint, body)
