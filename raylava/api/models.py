"""A trained model that answers questions about images, and holds conversations about them."""

from pathlib import Path

from PIL import Image

from raylava.evaluation.chat import ChatSession, load_chat_engine, open_image
from raylava.evaluation.engines import TransformersEngine
from raylava.models.checkpoint import find_checkpoint

ImageLike = Image.Image | str | Path


class Model:
    """A LLaVA model in memory, on the GPU if there is one; made by `load_model`. Answers are decoded greedily."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine

    def answer(self, question: str, *images: ImageLike, max_new_tokens: int = 128) -> str:
        """Return the answer to one question about images: PIL images, or paths or URIs of files.

        Raises UserError for an image that cannot be read, and for an empty question.
        """
        return self.chat(max_new_tokens).ask(question, *images)

    def chat(self, max_new_tokens: int = 128) -> "Conversation":
        """Start a conversation, whose questions are answered with those before them as history."""
        return Conversation(ChatSession(self._engine, max_new_tokens))


class Conversation:
    """A conversation with a model; made by `Model.chat`."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session

    def ask(self, question: str, *images: ImageLike) -> str:
        """Return the answer to the next question; the images belong to its turn. Raises UserError as `Model.answer`."""
        return self._session.ask(question, [_open(image) for image in images])

    @property
    def history(self) -> list[tuple[str, str]]:
        """The questions with their answers so far."""
        return [(exchange.question, exchange.answer or "") for exchange in self._session.exchanges]


def _open(image: ImageLike) -> Image.Image:
    return image.convert("RGB") if isinstance(image, Image.Image) else open_image("image", str(image))


def load_model(model: str, *, transformers_version: str | None = None) -> Model:
    """Load a model to ask it questions: a finetune artifact, a Hugging Face LLaVA folder or a hub id.

    `transformers_version` is the version that saved the model, if its config.json is wrong about it. Raises UserError
    when the model is incomplete or damaged.
    """
    return Model(load_chat_engine(find_checkpoint(model, transformers_version)))
