"""Engines answer each question independently of its batch; an unusable model is reported."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raylava.cli import main
from raylava.evaluation.engines import TransformersEngine
from raylava.models.registry import LlavaCheckpoint


def test_batch_order_and_size_do_not_change_answers(untrained_llava: Path) -> None:
    engine = TransformersEngine(LlavaCheckpoint(str(untrained_llava)), torch.device("cpu"), "fp32")
    image = Image.fromarray(np.full((48, 48, 3), 90, np.uint8))
    questions = [f"What {'very ' * count}thing is it?" for count in range(5)]
    batched = engine.answer(questions, [image] * 5, 4)
    reversed_batch = engine.answer(questions[::-1], [image] * 5, 4)[::-1]
    single = [engine.answer([question], [image], 4)[0] for question in questions]
    assert batched == reversed_batch == single


def test_missing_model_and_unknown_precision_are_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "a", "answer": "b"}\n')
    options = ["--benchmark", "custom", "--data", str(tmp_path / "q.jsonl"), "--storage", str(tmp_path)]
    assert main(["evaluate", str(tmp_path), *options]) == 2
    error = capfd.readouterr().err.replace("\n", " ")
    assert "(no config.json); give a finetune artifact or a Hugging Face folder" in error
    assert main(["evaluate", str(tmp_path), *options, "--precision", "int4"]) == 2
    assert "--precision int4: unknown precision; choose one of: auto, fp32, bf16, fp16" in capfd.readouterr().err
