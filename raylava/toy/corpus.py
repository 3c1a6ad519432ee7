"""Writes scenes to disk: images, alignment and instruction corpora as LLaVA JSON, held-out questions as JSONL."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from raylava.toy.scenes import QUESTION_TYPES, Scene, caption, draw_question, draw_scene, render

DESCRIBE = "Describe the picture briefly."


def write_corpus(folder: Path, seed: int, alignment: int, instruction: int, heldout: int) -> None:
    """Write `alignment` captioned images, `instruction` conversations and `heldout` questions to `folder`.

    Each sample has its own image; the three sets are drawn from independent random streams.
    """
    streams = np.random.SeedSequence(seed).spawn(3)
    captions = [
        _row(f"caption-{number:05d}", scene, [(DESCRIBE, caption(scene))], folder)
        for number, (scene, _) in enumerate(_scenes(streams[0], alignment))
    ]
    conversations = [
        _row(f"talk-{number:05d}", scene, _exchanges(scene, rng), folder)
        for number, (scene, rng) in enumerate(_scenes(streams[1], instruction))
    ]
    questions = [
        _heldout_question(number, scene, rng, folder)
        for number, (scene, rng) in enumerate(_scenes(streams[2], heldout))
    ]
    (folder / "alignment.json").write_text(json.dumps(captions))
    (folder / "instruction.json").write_text(json.dumps(conversations))
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))


def _scenes(stream: np.random.SeedSequence, count: int) -> list[tuple[Scene, np.random.Generator]]:
    """Draw scenes, each with its own random generator, which later draws the questions about it."""
    generators = (np.random.Generator(np.random.PCG64(child)) for child in stream.spawn(count))
    return [(draw_scene(rng), rng) for rng in generators]


def _exchanges(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    kinds = rng.permutation(len(QUESTION_TYPES))
    questions = (draw_question(scene, QUESTION_TYPES[kind], rng) for kind in kinds)
    return [(question.text, question.answer) for question in questions]


def _row(sample_id: str, scene: Scene, exchanges: list[tuple[str, str]], folder: Path) -> dict[str, Any]:
    turns = []
    for number, (question, answer) in enumerate(exchanges):
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": sample_id, "image": _save_image(sample_id, scene, folder), "conversations": turns}


def _heldout_question(number: int, scene: Scene, rng: np.random.Generator, folder: Path) -> dict[str, Any]:
    question = draw_question(scene, QUESTION_TYPES[number % len(QUESTION_TYPES)], rng)
    question_id = f"heldout-{number:05d}"
    return {
        "question_id": question_id,
        "image": _save_image(question_id, scene, folder),
        "text": question.text,
        "category": question.kind,
        "answer": question.answer,
    }


def _save_image(sample_id: str, scene: Scene, folder: Path) -> str:
    """Render a scene below `folder`/images; return its path relative to that folder."""
    name = f"{sample_id.partition('-')[0]}/{sample_id}.png"
    file = folder / "images" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    render(scene).save(file)
    return name
