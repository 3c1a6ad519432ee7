"""Tokenizes conversations and marks the token spans that the loss covers.

Spans follow from the chat template's pieces, never from string lengths. Pure: imports neither Ray nor DeepSpeed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from raylava.corpus.quarantine import BadRow, Reason
from raylava.models.templates import IMAGE_TOKEN, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. `speaker` is "human" or "gpt", as in LLaVA JSON."""

    speaker: str
    text: str


@dataclass(frozen=True)
class TokenizedChat:
    """A tokenized conversation.

    `input_ids` has one `<image>` id per image; `loss_spans` are [start, stop) spans of `input_ids`.
    """

    input_ids: list[int]
    loss_spans: list[tuple[int, int]]
    image_count: int

    def length(self, image_tokens: int) -> int:
        """Return the number of tokens with every image expanded to `image_tokens` tokens."""
        return len(self.input_ids) + self.image_count * (image_tokens - 1)

    def expanded_lengths(self, image_id: int, image_tokens: int) -> Iterator[int]:
        """Yield, for each of `input_ids`, the number of tokens up to and with it, with images expanded."""
        return accumulate(image_tokens if token == image_id else 1 for token in self.input_ids)

    def truncate(self, max_length: int, image_id: int, image_tokens: int) -> "TokenizedChat":
        """Return the conversation cut to `max_length` tokens with images expanded.

        An image that would be cut is left out with everything after it. Loss spans are cut, too; none may be left.
        """
        count = sum(1 for length in self.expanded_lengths(image_id, image_tokens) if length <= max_length)
        spans = [(start, min(stop, count)) for start, stop in self.loss_spans if start < count]
        ids = self.input_ids[:count]
        return TokenizedChat(ids, spans, ids.count(image_id))


class ChatTokenizer:
    """Tokenizes conversations by a chat template.

    Control tokens are inserted by id; control tokens that occur in a turn's text are tokenized as plain text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: Template) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._begin = self._control_id(template.begin)
        self._open = self._control_id(template.open)
        self._close = self._control_id(template.close)
        self._image = self._control_id(IMAGE_TOKEN)
        self._newline, self._gap, self._user_header, self._model_header = self._text_ids(
            ["\n", template.gap, template.user_header, template.model_header]
        )

    @property
    def image_id(self) -> int:
        """The id of `<image>`."""
        return self._image

    def encode(self, turns: Sequence[Turn], image_count: int) -> TokenizedChat:
        """Tokenize alternating turns, human first, that refer to `image_count` images.

        The loss covers each answer, its end-of-turn token and the newline after it. Raises BadRow (see `check_turns`).
        """
        check_turns(turns, image_count)
        questions = [turn.text for turn in turns[::2]]
        answers = [turn.text.strip() for turn in turns[1::2]]
        text_ids = self._text_ids([*map(self._question_text, questions), *answers])
        question_ids, answer_ids = text_ids[: len(questions)], text_ids[len(questions) :]
        ids = [self._begin]
        loss_spans: list[tuple[int, int]] = []
        for question, text, answer in zip(questions, question_ids, answer_ids, strict=True):
            ids += self._question_turn(question, text)
            start = len(ids)
            ids += [*answer, self._close, *self._gap]
            loss_spans.append((start, len(ids)))
        return TokenizedChat(ids, loss_spans, image_count)

    def prompt(self, text: str, image_count: int) -> list[int]:
        """Return the ids of a generation prompt: one question about `image_count` images, and the answer's header."""
        question = f"{IMAGE_TOKEN}\n" * image_count + text
        return [self._begin, *self._question_turn(question, *self._text_ids([self._question_text(question)]))]

    def _question_text(self, question: str) -> str:
        """Return the part of a question's turn that is tokenized as one text.

        Turns are split at control tokens only, so that the ids equal those of the whole conversation as one string.
        """
        text = self._template.human_text(question, 0)
        return "\n" + text if IMAGE_TOKEN in question else self._template.user_header + text

    def _question_turn(self, question: str, text_ids: list[int]) -> list[int]:
        """Return the ids of a human turn, its images first, and of the header that opens the answer."""
        image_count = question.count(IMAGE_TOKEN)
        image_ids: list[int] = []
        if image_count:
            image_ids = [*self._user_header, *[self._image, *self._newline] * (image_count - 1), self._image]
        return [self._open, *image_ids, *text_ids, self._close, *self._gap, self._open, *self._model_header]

    def _text_ids(self, texts: list[str]) -> list[list[int]]:
        """Tokenize plain texts. An `<end_of_turn>` in a text becomes characters, not the control token."""
        encoded = self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )
        return encoded["input_ids"]

    def _control_id(self, token: str) -> int:
        token_id = self._tokenizer.convert_tokens_to_ids(token)
        assert isinstance(token_id, int)
        assert token_id != self._tokenizer.unk_token_id, f"{token} is not in the tokenizer"
        return token_id


def check_turns(turns: Sequence[Turn], image_count: int) -> None:
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
    image_tokens = sum(turn.text.count(IMAGE_TOKEN) for turn in turns[::2])
    if image_tokens > image_count:
        raise BadRow(Reason.TOKEN_WITHOUT_IMAGE, f"{image_tokens} image tokens for {image_count} images")
    if image_tokens < image_count:
        raise BadRow(Reason.IMAGE_WITHOUT_TOKEN, f"{image_count} images for {image_tokens} image tokens")
    if any(IMAGE_TOKEN in turn.text for turn in turns[1::2]):
        raise BadRow(Reason.TOKEN_WITHOUT_IMAGE, "an answer contains an image token")
