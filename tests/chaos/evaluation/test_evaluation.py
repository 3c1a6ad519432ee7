"""An evaluation that is killed resumes when the same command runs again."""

import json
import subprocess
import sys
import time
from pathlib import Path

from raylava.evaluation.prediction_store import PredictionStore
from raylava.storage import storage_path
from tests.support.processes import kill_with_children

# The command line with every batch of answers flushed immediately.
COMMAND_LINE = """
import sys
from raylava.cli import main
from raylava.evaluation import prediction_store
prediction_store._FLUSH_INTERVAL_S = 0.0
sys.exit(main(sys.argv[1:]))
"""


def test_killed_evaluation_resumes_with_the_same_command(untrained_llava: Path, tmp_path: Path) -> None:
    lines = [{"question_id": number, "text": f"What is {number}?", "answer": "x"} for number in range(120)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    storage = tmp_path / "storage"
    options = ["--benchmark", "custom", "--data", str(tmp_path / "q.jsonl"), "--batch-size", "1"]
    options += ["--max-new-tokens", "3", "--storage", str(storage), "--json"]
    command = [sys.executable, "-c", COMMAND_LINE, "evaluate", str(untrained_llava), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while len(list(storage.glob("evaluate/*/answers/*.parquet"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_with_children(process)
    modified_ns = {file: file.stat().st_mtime_ns for file in storage.glob("evaluate/*/answers/*.parquet")}
    store = PredictionStore(storage_path(next(storage.glob("evaluate/*"))))
    assert 0 < len(store.predictions) < 120, "the evaluation was killed before it finished"
    resumed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(resumed.stdout)["metrics"]["questions"] == 120
    assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in modified_ns.items()), "stored answers are kept"
    answers = PredictionStore(storage_path(next(storage.glob("evaluate/*")))).predictions
    assert sorted(int(answer.question_id) for answer in answers) == list(range(120)), "each is answered once"
