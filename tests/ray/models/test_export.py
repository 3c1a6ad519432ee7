"""Plain transformers loads an exported model, without raylava, and gives the same answers."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from raylava.evaluation.engines import TransformersEngine
from raylava.models.registry import LlavaCheckpoint

SCRIPT = """
import json, sys, torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder, *questions = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
answers = []
for question in questions:
    messages = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (60, 40), "red")},
                                             {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                           return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6)
    answers.append(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
assert "raylava" not in sys.modules
problems = {key: sorted(value) for key, value in info.items() if value}
print(json.dumps({"answers": answers, "problems": problems}))
"""
QUESTIONS = ["How many shapes are there?", "Is there a red circle?", "Where?"]


def test_plain_transformers_gives_the_same_answers_without_warnings_about_weights(exported: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(exported), *QUESTIONS]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=exported)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["problems"] == {}
    for word in ("not initialized", "not used", "newly", "unexpected", "missing", "mismatch"):
        assert word not in process.stderr.lower()
    images: list[Image.Image | None] = [Image.new("RGB", (60, 40), "red")] * len(QUESTIONS)
    engine = TransformersEngine(LlavaCheckpoint(str(exported)), torch.device("cpu"))
    assert engine.answer(QUESTIONS, images, max_new_tokens=6) == result["answers"]
