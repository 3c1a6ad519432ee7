"""Scenes as files: images, alignment and instruction corpora in LLaVA JSON, held-out questions in JSONL."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from raylava.toy.scenes import QUESTION_TYPES, Scene, caption, draw_scene, question, render

DESCRIBE = "Describe the picture briefly."


def write_corpus(folder: Path, seed: int, alignment: int, instruction: int, heldout: int) -> None:
    """Write so many captioned images, conversations and held-out questions; no image is in two of the three."""
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
        _question(number, scene, rng, folder) for number, (scene, rng) in enumerate(_scenes(streams[2], heldout))
    ]
    (folder / "alignment.json").write_text(json.dumps(captions))
    (folder / "instruction.json").write_text(json.dumps(conversations))
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))


def _scenes(stream: np.random.SeedSequence, count: int) -> "list[tuple[Scene, np.random.Generator]]":
    generators = (np.random.Generator(np.random.PCG64(child)) for child in stream.spawn(count))
    return [(draw_scene(rng), rng) for rng in generators]


def _exchanges(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    asked = (question(scene, QUESTION_TYPES[kind], rng) for kind in rng.permutation(len(QUESTION_TYPES)))
    return [(one.text, one.answer) for one in asked]


def _row(name: str, scene: Scene, exchanges: list[tuple[str, str]], folder: Path) -> dict[str, Any]:
    turns = []
    for number, (asked, answered) in enumerate(exchanges):
        turns.append({"from": "human", "value": asked if number else f"<image>\n{asked}"})
        turns.append({"from": "gpt", "value": answered})
    return {"id": name, "image": _draw(name, scene, folder), "conversations": turns}


def _question(number: int, scene: Scene, rng: np.random.Generator, folder: Path) -> dict[str, Any]:
    one = question(scene, QUESTION_TYPES[number % len(QUESTION_TYPES)], rng)
    name = f"heldout-{number:05d}"
    return {
        "question_id": name,
        "image": _draw(name, scene, folder),
        "text": one.text,
        "category": one.kind,
        "answer": one.answer,
    }


def _draw(name: str, scene: Scene, folder: Path) -> str:
    path = f"{name.partition('-')[0]}/{name}.png"
    (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
    render(scene).save(folder / "images" / path)
    return path
