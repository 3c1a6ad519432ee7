"""Renders comparisons as one self-contained HTML page: score differences, and questions on which models differ."""

from collections.abc import Sequence
from typing import Any

from raylava.evaluation.compare import ComparedQuestion, Comparison
from raylava.evaluation.question_images import inline_image
from raylava.pages.render import render
from raylava.storage import StoragePath, storage_path

_MAX_QUESTIONS = 48  # per benchmark


def page(comparisons: Sequence[Comparison]) -> str:
    """Return the HTML of the page; all text from files is escaped."""
    return render("comparison.html", title="Where models differ", comparisons=[_section(each) for each in comparisons])


def _section(comparison: Comparison) -> dict[str, Any]:
    names = list(comparison.mean_scores)
    images = storage_path(comparison.images)
    differing = [question for question in comparison.questions if question.differs]
    return {
        "benchmark": comparison.benchmark,
        "mean_scores": comparison.mean_scores,
        "baseline": names[0],
        "differences": comparison.differences,
        "differing": len(differing),
        "questions": len(comparison.questions),
        "cards": [_card(question, names, images) for question in differing[:_MAX_QUESTIONS]],
    }


def _card(question: ComparedQuestion, names: Sequence[str], images: StoragePath) -> dict[str, Any]:
    image, problem = inline_image(images, question.image) if question.image else ("", "")
    best = max(question.scores)
    return {
        "question_id": question.question_id,
        "text": question.text,
        "references": ", ".join(dict.fromkeys(question.references)),
        "image_name": question.image,
        "image": image,
        "problem": problem,
        "answers": [
            {"model": name[0], "text": answer, "best": score == best}
            for name, answer, score in zip(names, question.answers, question.scores, strict=True)
        ],
    }
