"""A conversation with a model about images, on this machine: `raylava chat`."""

import os
from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image

from raylava.corpus.quarantine import BadRow
from raylava.errors import UserError, first_line
from raylava.evaluation.engines import Exchange, TransformersEngine
from raylava.evaluation.generation import read_rgb_image
from raylava.models.registry import LlavaCheckpoint
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import StoragePath, storage_path


class ConversationEngine(Protocol):
    """A loaded model that continues conversations."""

    def continue_conversation(self, conversation: Sequence[Exchange], max_new_tokens: int) -> str:
        """Return the answer to the last question, whose exchange has no answer yet."""


class ChatSession:
    """One conversation: each question is answered with the exchanges before it as its history."""

    def __init__(self, engine: ConversationEngine, max_new_tokens: int) -> None:
        self._engine, self._max_new_tokens = engine, max_new_tokens
        self.exchanges: list[Exchange] = []

    def ask(self, question: str, images: Sequence[Image.Image] = ()) -> str:
        """Answer a question; the images belong to its turn. A question that is interrupted leaves no trace.

        Raises UserError for an empty question. An image token in the text is removed, since no image is its own.
        """
        text = question.replace(IMAGE_TOKEN, "").strip()
        if not text:
            raise UserError("the question is empty; write some text")
        asked = Exchange(text, tuple(images))
        answer = self._engine.continue_conversation([*self.exchanges, asked], self._max_new_tokens)
        self.exchanges.append(Exchange(text, asked.images, answer.replace(IMAGE_TOKEN, "")))
        return answer

    def restart(self) -> None:
        """Forget the conversation and its images."""
        self.exchanges.clear()


def load_chat_engine(model: LlavaCheckpoint) -> TransformersEngine:
    """Load a model for a conversation, on a GPU if there is one. Raises UserError if it is unusable."""
    return TransformersEngine(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def open_image(option: str, file: str) -> Image.Image:
    """Return the image in a file or object. Raises UserError, which names `option`, if it is unusable."""
    try:
        path = storage_path(file)
        if path.is_local:  # a user may well name a link to an image elsewhere
            path = storage_path(os.path.realpath(path.path))
        folder = StoragePath(path.filesystem, path.path.rpartition("/")[0], path.uri.rpartition("/")[0])
        return read_rgb_image(folder, path.name)
    except (OSError, BadRow) as error:
        raise UserError(f"{option} {file}: {first_line(error)}; give an image file") from error
