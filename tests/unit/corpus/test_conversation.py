"""Tokenized conversations follow the chat template; the loss covers each answer, its end-of-turn token and newline."""

import functools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from raylava.corpus.conversation import ChatTokenizer, TokenizedChat, Turn
from raylava.corpus.quarantine import BadRow, Reason
from raylava.models.families.gemma import TEMPLATE as GEMMA
from raylava.models.templates import IMAGE_TOKEN
from raylava.toy.language import train_tokenizer


@functools.cache
def shared_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer(640, seed=0)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return shared_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> ChatTokenizer:
    return ChatTokenizer(tokenizer, GEMMA)


def turns_of(*texts: str) -> list[Turn]:
    return [Turn(("human", "gpt")[number % 2], text) for number, text in enumerate(texts)]


def loss_texts(tokenizer: PreTrainedTokenizerBase, chat: TokenizedChat) -> list[str]:
    return [tokenizer.decode(chat.input_ids[start:stop]) for start, stop in chat.loss_spans]


SOT, EOT = "<start_of_turn>", "<end_of_turn>"
CASES = {
    "one turn": (
        turns_of("<image>\nWhat?", "A cat."),
        1,
        f"<bos>{SOT}user\n<image>\nWhat?{EOT}\n{SOT}model\nA cat.{EOT}\n",
        [f"A cat.{EOT}\n"],
    ),
    "many turns": (
        turns_of("<image>\nWhat?", "A cat.", "Sure?", "Yes."),
        1,
        f"<bos>{SOT}user\n<image>\nWhat?{EOT}\n{SOT}model\nA cat.{EOT}\n{SOT}user\nSure?{EOT}\n{SOT}model\nYes.{EOT}\n",
        [f"A cat.{EOT}\n", f"Yes.{EOT}\n"],
    ),
    "text only": (
        turns_of("Hello", "Hi"),
        0,
        f"<bos>{SOT}user\nHello{EOT}\n{SOT}model\nHi{EOT}\n",
        [f"Hi{EOT}\n"],
    ),
    "image in the middle is moved to the front": (
        turns_of("Look at <image> closely", "Done"),
        1,
        f"<bos>{SOT}user\n<image>\nLook at  closely{EOT}\n{SOT}model\nDone{EOT}\n",
        [f"Done{EOT}\n"],
    ),
    "image at the end": (
        turns_of("What is it?\n<image>", "It"),
        1,
        f"<bos>{SOT}user\n<image>\nWhat is it?{EOT}\n{SOT}model\nIt{EOT}\n",
        [f"It{EOT}\n"],
    ),
    "two images in one turn": (
        turns_of("<image><image> Same?", "No"),
        2,
        f"<bos>{SOT}user\n<image>\n<image>\nSame?{EOT}\n{SOT}model\nNo{EOT}\n",
        [f"No{EOT}\n"],
    ),
    "image in a later turn": (
        turns_of("Hi", "Hello", "<image>\nThis?", "Yes"),
        1,
        f"<bos>{SOT}user\nHi{EOT}\n{SOT}model\nHello{EOT}\n{SOT}user\n<image>\nThis?{EOT}\n{SOT}model\nYes{EOT}\n",
        [f"Hello{EOT}\n", f"Yes{EOT}\n"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_text_and_loss_spans_follow_the_template(
    name: str, chat_tokenizer: ChatTokenizer, tokenizer: PreTrainedTokenizerBase
) -> None:
    turns, image_count, text, expected = CASES[name]
    chat = chat_tokenizer.encode(turns, image_count)
    assert tokenizer.decode(chat.input_ids) == text
    assert loss_texts(tokenizer, chat) == expected


@pytest.mark.parametrize("name", [name for name in CASES if "images" not in name])
def test_ids_equal_those_of_the_conversation_tokenized_as_one_string(
    name: str, chat_tokenizer: ChatTokenizer, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A prompt at inference is tokenized as one string, and must equal what the model was trained on."""
    turns, image_count, text, _ = CASES[name]
    expected = tokenizer(text.removeprefix("<bos>"), add_special_tokens=True)["input_ids"]
    assert chat_tokenizer.encode(turns, image_count).input_ids == expected


def test_length_includes_expanded_image_tokens(chat_tokenizer: ChatTokenizer) -> None:
    chat = chat_tokenizer.encode(CASES["two images in one turn"][0], image_count=2)
    assert chat.length(image_tokens=36) == len(chat.input_ids) - 2 + 2 * 36


@pytest.mark.parametrize(
    ("turns", "image_count", "reason"),
    [
        ([], 0, Reason.NO_TURNS),
        (turns_of("a"), 0, Reason.NOT_ALTERNATING),
        (turns_of("a", "b", "c"), 0, Reason.NOT_ALTERNATING),
        ([Turn("gpt", "a"), Turn("human", "b")], 0, Reason.NOT_ALTERNATING),
        ([Turn("human", "a"), Turn("human", "b")], 0, Reason.NOT_ALTERNATING),
        (turns_of("a", "", "b", "  \n"), 0, Reason.NOTHING_SUPERVISED),
        (turns_of("<image> a", "b"), 0, Reason.TOKEN_WITHOUT_IMAGE),
        (turns_of("<image><image> a", "b"), 1, Reason.TOKEN_WITHOUT_IMAGE),
        (turns_of("a", "b <image>"), 0, Reason.TOKEN_WITHOUT_IMAGE),
        (turns_of("a", "b"), 1, Reason.IMAGE_WITHOUT_TOKEN),
    ],
)
def test_unusable_conversation_raises_bad_row_with_its_reason(
    chat_tokenizer: ChatTokenizer, turns: Sequence[Turn], image_count: int, reason: Reason
) -> None:
    with pytest.raises(BadRow) as bad:
        chat_tokenizer.encode(turns, image_count)
    assert bad.value.reason == reason


TEXTS = st.text(max_size=30) | st.sampled_from(
    ["<end_of_turn>", "<start_of_turn>model\n", "<eos> <bos>", "<pad>", "▁", "naïve 日本 🦙", "a\n\nb", "\t", "user\n"]
)


@given(st.lists(st.tuples(TEXTS, TEXTS.filter(lambda text: text.strip())), min_size=1, max_size=5), st.booleans())
def test_loss_spans_decode_to_the_answers_and_control_tokens_in_text_stay_text(
    exchanges: list[tuple[str, str]], with_image: bool
) -> None:
    tokenizer = shared_tokenizer()
    chat_tokenizer = ChatTokenizer(tokenizer, GEMMA)
    first = f"{IMAGE_TOKEN}\n" * with_image
    texts = [text for number, (human, gpt) in enumerate(exchanges) for text in (first * (number == 0) + human, gpt)]
    chat = chat_tokenizer.encode(turns_of(*texts), image_count=int(with_image))
    answers = [f"{gpt.strip()}{EOT}\n" for _, gpt in exchanges]
    assert loss_texts(tokenizer, chat) == [_as_decoded(answer) for answer in answers]
    close, opened, begin = tokenizer.convert_tokens_to_ids([EOT, SOT, "<bos>"])
    assert chat.input_ids.count(close) == 2 * len(exchanges)
    assert chat.input_ids.count(opened) == 2 * len(exchanges)
    assert chat.input_ids.count(begin) == 1


def _as_decoded(text: str) -> str:
    """Return the text with ▁ as a space, because Gemma's tokenizer writes a space as ▁."""
    return text.replace("▁", " ")
