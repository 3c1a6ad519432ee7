"""What a benchmark module fills in."""

from collections.abc import Callable
from dataclasses import dataclass

from raylava.evaluation.metrics.scoring import Scoring
from raylava.evaluation.questions import Question
from raylava.storage import StoragePath


@dataclass(frozen=True)
class OfficialBenchmark:
    """A benchmark with published files: how to read them, where its images are, how its answers are scored.

    `read` returns the questions below the data folder. `image_folders` are candidates below that folder; the first that
    exists is used, or the data folder itself. `max_new_tokens` limits the length of an answer.
    """

    name: str
    read: Callable[[StoragePath], list[Question]]
    scoring: Scoring
    image_folders: tuple[str, ...] = ()
    max_new_tokens: int = 16

    def image_root(self, data: StoragePath) -> StoragePath:
        """Return the folder of the images."""
        candidates = (data / folder for folder in self.image_folders)
        return next((folder for folder in candidates if folder.is_folder()), data)
