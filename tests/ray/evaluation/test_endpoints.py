"""`raylava evaluate` with a server of the model writes the same records as with the model loaded by its actors."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.errors import RunError
from raylava.evaluation.endpoint_generation import RetryPolicy, generate_with_endpoints
from raylava.evaluation.endpoints import KEY_VARIABLE
from raylava.evaluation.engines import TransformersEngine
from raylava.evaluation.generation import ActorPool, GenerationConfig
from raylava.evaluation.questions import Question
from raylava.evaluation.vllm_server import VllmServers
from raylava.models.registry import LlavaCheckpoint
from raylava.progress import NullProgressBar
from tests.conftest import SECRET
from tests.support import chat_server
from tests.support.chat_server import ANSWER, ChatRequest, ChatServer

RECORDS = ("questions.jsonl", "answers.jsonl", "per_question_scores.json")
LOCAL_SERVER = (sys.executable, str(Path(chat_server.__file__)))

pytestmark = pytest.mark.usefixtures("ray_cluster")


class ServedModel:
    """Answers a server's requests with a model, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._engine = TransformersEngine(LlavaCheckpoint(str(folder)), torch.device("cpu"), "fp32")
        self._lock = threading.Lock()

    def __call__(self, request: ChatRequest) -> str:
        with self._lock:
            return self._engine.answer([request.question], [request.image], request.max_tokens, [request.history])[0]


def test_endpoint_writes_the_records_of_the_engine_and_neither_its_url_nor_the_key(
    toy_assets: Artifact,
    untrained_llava: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    server = ChatServer(ServedModel(untrained_llava), key=SECRET)
    corpus = Path((toy_assets.path / "corpus").path)
    command = ["evaluate", str(untrained_llava), "--benchmark", "custom", "--data", str(corpus / "questions.jsonl")]
    command += ["--images", str(corpus / "images"), "--storage", str(tmp_path), "--json", "--max-new-tokens", "3"]

    def evaluate(*options: str) -> dict[str, dict[str, object]]:
        assert main([*command, *options]) == 0
        return json.loads(capfd.readouterr().out)

    loaded, served = evaluate("--precision", "fp32"), evaluate("--endpoint", server.url)
    folders = [tmp_path / "evaluate" / str(record["fingerprint"]) for record in (loaded, served)]
    assert loaded["metrics"] == served["metrics"]
    for name in RECORDS:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    with_endpoint = loaded["fingerprint_fields"] | {"endpoint": {"served_model": "toy"}}
    del with_endpoint["precision"]
    assert served["fingerprint_fields"] == with_endpoint
    for file in filter(Path.is_file, folders[1].rglob("*")):
        assert server.url.encode() not in file.read_bytes()
        assert SECRET.encode() not in file.read_bytes()

    asked = len(server.requests)
    server.close()
    again = evaluate("--endpoint", "http://127.0.0.1:1/v1", "--served-model", "toy")
    assert again["finished"] == served["finished"], "the URL is not part of the fingerprint"
    assert len(server.requests) == asked == 20


def ask_started_servers(model: Path, servers: VllmServers, workers: int) -> list[str | None]:
    config = GenerationConfig(LlavaCheckpoint(str(model)), "", max_new_tokens=2)
    questions = [Question(str(number), None, f"What is {number}?", "all", ("x",)) for number in range(6)]
    answers = generate_with_endpoints(
        questions, config, servers, ActorPool(workers), NullProgressBar(), retry=RetryPolicy(attempts=2)
    )
    return [answer.text for answer in answers]


def test_servers_are_started_in_actors_and_end_with_the_evaluation(untrained_llava: Path, tmp_path: Path) -> None:
    process_ids = tmp_path / "process-ids"
    command = ("sh", "-c", f'echo $$ >> {process_ids}; exec "$0" "$@"', *LOCAL_SERVER)
    servers = VllmServers(concurrency=2, command=command, requirements=())
    assert ask_started_servers(untrained_llava, servers, workers=2) == [ANSWER] * 6
    started = process_ids.read_text().split()
    assert len(started) == 2
    assert not [process for process in started if Path("/proc", process).exists()]


def test_server_that_ends_before_it_is_ready_is_reported_with_the_place_of_its_log(untrained_llava: Path) -> None:
    servers = VllmServers(command=("false",), requirements=())
    with pytest.raises(RunError, match=r"ended with status 1 before it was ready; see `ray logs actor --id [0-9a-f]+`"):
        ask_started_servers(untrained_llava, servers, workers=1)
    servers = VllmServers(command=("no-such-program",), requirements=())
    with pytest.raises(RunError, match=r"^vLLM cannot be started \(no-such-program: No such file or directory\)$"):
        ask_started_servers(untrained_llava, servers, workers=1)
