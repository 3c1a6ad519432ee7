"""The gallery of a report: questions with their images, the model's answers and those of the baselines."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from raylava.evaluation.compare import ANSWERS_FILE, PER_QUESTION_SCORES, QUESTIONS_FILE
from raylava.evaluation.question_images import MAX_SIDE, inline_image
from raylava.pipeline.run_report.scores import MODEL
from raylava.pipeline.run_report.stages import ReportStage
from raylava.storage import StoragePath, storage_path

MAX_QUESTIONS = 1000  # of all benchmarks together
_RIGHT = 0.5  # an answer with at least this score counts as right


def gallery_data(
    name: str, evaluations: Mapping[str, ReportStage], limit: int, images: dict[str, str]
) -> dict[str, Any]:
    """Return at most `limit` questions of a benchmark, evenly spaced in its order, with all answers to each.

    `images` receives the data URI of each image by its name.
    """
    stage = evaluations[MODEL]
    questions = _read_lines(stage.path / QUESTIONS_FILE)
    answers = {column: _answers(each) for column, each in evaluations.items()}
    scores = _scores(stage)
    chosen = np.unique(np.linspace(0, len(questions) - 1, min(limit, len(questions))).round().astype(int))
    folder = stage.metrics.get("images")
    root = storage_path(folder) if folder else None
    cards = [_card(questions[number], answers, scores) for number in chosen]
    for card in cards:
        card["problem"] = card["problem"] or _add_image(card, name, root, images)
    return {
        "benchmark": name,
        "questions": len(questions),
        "shown": len(cards),
        "max_side": MAX_SIDE,
        "right_from": _RIGHT,
        "categories": sorted({card["category"] for card in cards}),
        "cards": cards,
    }


def _card(
    question: Mapping[str, Any], answers: Mapping[str, Mapping[str, dict[str, Any]]], scores: Mapping[str, float]
) -> dict[str, Any]:
    question_id = question["question_id"]
    texts = {column: by_id.get(question_id, {}) for column, by_id in answers.items()}
    score = scores.get(question_id)
    return {
        "question_id": question_id,
        "question": question["text"],
        "category": question["category"],
        "references": list(dict.fromkeys(question["references"])),
        "answer": texts[MODEL].get("text"),
        "score": score,
        "verdict": "" if score is None else "right" if score >= _RIGHT else "wrong",
        "baselines": [
            {"name": column, "answer": answer.get("text")} for column, answer in texts.items() if column != MODEL
        ],
        "image": question["image"],
        "problem": (texts[MODEL].get("metadata") or {}).get("problem") or "",
    }


def _add_image(card: dict[str, Any], name: str, root: StoragePath | None, images: dict[str, str]) -> str:
    """Add the image of a card; return the problem where it cannot be shown. The card then names the added image."""
    if card["image"] is None:
        return ""
    if root is None:
        return f"{card['image']}: the evaluation does not record the folder of its images"
    key = f"{name}/{card['image']}"
    if key not in images:
        content, problem = inline_image(root, card["image"])
        if problem:
            return problem
        images[key] = content
    card["image"] = key
    return ""


def _answers(stage: ReportStage) -> dict[str, dict[str, Any]]:
    return {line["question_id"]: line for line in _read_lines(stage.path / ANSWERS_FILE)}


def _scores(stage: ReportStage) -> dict[str, float]:
    file = stage.path / PER_QUESTION_SCORES
    return json.loads(file.read_bytes()) if "scores" in stage.metrics else {}


def _read_lines(file: StoragePath) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]
