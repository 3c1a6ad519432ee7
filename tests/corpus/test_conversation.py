"""What is supervised is each answer, its end of turn and the newline after it; ids are the template's."""

import functools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from raylava.corpus.conversation import ChatTokenizer, TokenizedChat, Turn
from raylava.corpus.quarantine import BadRow, Reason
from raylava.models.templates import GEMMA, IMAGE_TOKEN
from raylava.toy.language import train_tokenizer


@functools.cache
def shared_tokenizer() -> PreTrainedTokenizerBase:
    made = train_tokenizer(640, seed=0)
    made.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return made


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return shared_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerBase) -> ChatTokenizer:
    return ChatTokenizer(tokenizer, GEMMA)


def turns_of(*texts: str) -> list[Turn]:
    return [Turn(("human", "gpt")[number % 2], text) for number, text in enumerate(texts)]


def supervised_texts(tokenizer: PreTrainedTokenizerBase, encoded: TokenizedChat) -> list[str]:
    return [tokenizer.decode(encoded.input_ids[start:stop]) for start, stop in encoded.loss_spans]


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
def test_text_and_spans_are_the_templates(
    name: str, encoder: ChatTokenizer, tokenizer: PreTrainedTokenizerBase
) -> None:
    turns, images, text, supervised = CASES[name]
    encoded = encoder.encode(turns, images)
    assert tokenizer.decode(encoded.input_ids) == text
    assert supervised_texts(tokenizer, encoded) == supervised


@pytest.mark.parametrize("name", [name for name in CASES if "images" not in name])
def test_ids_equal_those_of_the_whole_string_tokenized_at_once(
    name: str, encoder: ChatTokenizer, tokenizer: PreTrainedTokenizerBase
) -> None:
    """So that a prompt at inference, tokenized as one string, is what training saw."""
    turns, images, text, _ = CASES[name]
    whole = tokenizer(text.removeprefix("<bos>"), add_special_tokens=True)["input_ids"]
    assert encoder.encode(turns, images).input_ids == whole


def test_length_counts_every_image_token(encoder: ChatTokenizer) -> None:
    encoded = encoder.encode(CASES["two images in one turn"][0], images=2)
    assert encoded.length(image_tokens=36) == len(encoded.input_ids) - 2 + 2 * 36


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
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
def test_a_conversation_that_cannot_be_trained_on_is_refused_with_its_reason(
    encoder: ChatTokenizer, turns: Sequence[Turn], images: int, reason: Reason
) -> None:
    with pytest.raises(BadRow) as bad:
        encoder.encode(turns, images)
    assert bad.value.reason == reason


TYPED = st.text(max_size=30) | st.sampled_from(
    ["<end_of_turn>", "<start_of_turn>model\n", "<eos> <bos>", "<pad>", "▁", "naïve 日本 🦙", "a\n\nb", "\t", "user\n"]
)


@settings(deadline=None)
@given(st.lists(st.tuples(TYPED, TYPED.filter(lambda text: text.strip())), min_size=1, max_size=5), st.booleans())
def test_supervised_spans_decode_to_each_answer_and_typed_control_tokens_stay_text(
    exchanges: list[tuple[str, str]], with_image: bool
) -> None:
    tokenizer = shared_tokenizer()
    encoder = ChatTokenizer(tokenizer, GEMMA)
    first = f"{IMAGE_TOKEN}\n" * with_image
    texts = [text for number, (human, gpt) in enumerate(exchanges) for text in (first * (number == 0) + human, gpt)]
    encoded = encoder.encode(turns_of(*texts), images=int(with_image))
    answers = [f"{gpt.strip()}{EOT}\n" for _, gpt in exchanges]
    assert supervised_texts(tokenizer, encoded) == [_as_tokenized(answer) for answer in answers]
    close, opened, begin = tokenizer.convert_tokens_to_ids([EOT, SOT, "<bos>"])
    assert encoded.input_ids.count(close) == 2 * len(exchanges)
    assert encoded.input_ids.count(opened) == 2 * len(exchanges)
    assert encoded.input_ids.count(begin) == 1


def _as_tokenized(text: str) -> str:
    """Gemma's tokenizer writes a space as ▁, so a typed ▁ comes back as a space."""
    return text.replace("▁", " ")
