"""A conversation → token ids and the spans that the loss counts, from the template itself, never by measuring strings.

Pure: imports neither Ray nor DeepSpeed. Raises BadRow with a reason for what can't be a training sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raylava.corpus.quarantine import BadRow, Reason
from raylava.models.templates import IMAGE_TOKEN, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Turn:
    """What one side said. `speaker` is "human" or "gpt", as in LLaVA JSON."""

    speaker: str
    text: str


@dataclass(frozen=True)
class TokenizedChat:
    """`input_ids` holds one `<image>` id where each image stands; `loss_spans` are [start, stop) spans of it."""

    input_ids: list[int]
    loss_spans: list[tuple[int, int]]
    images: int

    def length(self, image_tokens: int) -> int:
        """Tokens once each image token is expanded."""
        return len(self.input_ids) + self.images * (image_tokens - 1)


class ChatTokenizer:
    """Writes conversations as token ids by a template. Control tokens go in by id; what people wrote stays text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: Template) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._begin = self._control(template.begin)
        self._open = self._control(template.open)
        self._close = self._control(template.close)
        self._image = self._control(IMAGE_TOKEN)
        self._newline, self._gap, self._user_header, self._model_header = self._texts(
            ["\n", template.gap, template.user_header, template.model_header]
        )

    def encode(self, turns: Sequence[Turn], images: int) -> TokenizedChat:
        """Token ids and loss_spans spans of alternating turns, human first, that show `images` images.

        Supervised is each answer with its end-of-turn token and the newline after it. Raises BadRow.
        """
        check_turns(turns, images)
        questions = [turn.text for turn in turns[::2]]
        words = self._texts([*map(self._words, questions), *(turn.text.strip() for turn in turns[1::2])])
        ids = [self._begin]
        loss_spans: list[tuple[int, int]] = []
        for question, asked, answered in zip(questions, words[: len(questions)], words[len(questions) :], strict=True):
            ids += self._question(question, asked)
            start = len(ids)
            ids += [*answered, self._close, *self._gap]
            loss_spans.append((start, len(ids)))
        return TokenizedChat(ids, loss_spans, images)

    def prompt(self, text: str, images: int) -> list[int]:
        """The ids that a model sees before it answers one question about `images` images."""
        question = f"{IMAGE_TOKEN}\n" * images + text
        return [self._begin, *self._question(question, *self._texts([self._words(question)]))]

    def _words(self, question: str) -> str:
        """The text around which a question's control tokens go. Cut at those only: ids equal the whole string's."""
        words = self._template.human_text(question, 0)
        return "\n" + words if IMAGE_TOKEN in question else self._template.user_header + words

    def _question(self, question: str, words: list[int]) -> list[int]:
        images = question.count(IMAGE_TOKEN)
        shown = [*self._user_header, *[self._image, *self._newline] * (images - 1), self._image] if images else []
        return [self._open, *shown, *words, self._close, *self._gap, self._open, *self._model_header]

    def _texts(self, texts: list[str]) -> list[list[int]]:
        """Ids of plain texts; `<end_of_turn>` typed by a person is encoded as characters, not as the control token."""
        encoded = self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )
        return encoded["input_ids"]

    def _control(self, token: str) -> int:
        found = self._tokenizer.convert_tokens_to_ids(token)
        assert isinstance(found, int)
        assert found != self._tokenizer.unk_token_id, f"{token} is not in the tokenizer"
        return found


def check_turns(turns: Sequence[Turn], images: int) -> None:
    """Raise BadRow unless turns alternate, human first, every question is answered and each image has its token."""
    if not turns:
        raise BadRow(Reason.NO_TURNS, "the conversation is empty")
    for position, turn in enumerate(turns):
        expected = ("human", "gpt")[position % 2]
        if turn.speaker != expected:
            raise BadRow(Reason.NOT_ALTERNATING, f"turn {position} is from {turn.speaker!r}, not {expected!r}")
    if len(turns) % 2:
        raise BadRow(Reason.NOT_ALTERNATING, "the last human turn has no answer")
    if not any(answer.text.strip() for answer in turns[1::2]):
        raise BadRow(Reason.NOTHING_SUPERVISED, "every answer is empty")
    tokens = sum(turn.text.count(IMAGE_TOKEN) for turn in turns[::2])
    if tokens > images:
        raise BadRow(Reason.TOKEN_WITHOUT_IMAGE, f"{tokens} image tokens for {images} images")
    if tokens < images:
        raise BadRow(Reason.IMAGE_WITHOUT_TOKEN, f"{images} images for {tokens} image tokens")
    if any(IMAGE_TOKEN in turn.text for turn in turns[1::2]):
        raise BadRow(Reason.TOKEN_WITHOUT_IMAGE, "an answer contains an image token")
