"""Questions and results for tests of metrics."""

from raylava.evaluation.metrics.score_table import BenchmarkResult
from raylava.evaluation.questions import Question


def make_question(
    question_id: object, references: str | tuple[str, ...], category: str = "all", unit: str = ""
) -> Question:
    """Return a question about an image with one reference or several."""
    references = (references,) if isinstance(references, str) else references
    return Question(str(question_id), "image.jpg", "text", category, references, unit=unit)


def metric_values(result: BenchmarkResult) -> dict[str, float]:
    """Return the value of each metric by name."""
    return {name: metric.value for name, metric in result.scores.items()}
