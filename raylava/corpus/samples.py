"""Turns one parsed source row into one training sample: checks, tokenization within `max_length`, image reading.

Needs no Ray; prepare.py calls it for every row.
"""

from collections.abc import Callable

from raylava.config.recipe import Corpus
from raylava.corpus.blocks import Sample
from raylava.corpus.conversation import ChatTokenizer, TokenizedChat, check_turns
from raylava.corpus.images import prepare_image
from raylava.corpus.quarantine import BadRow, Reason
from raylava.corpus.rows import SourceRow
from raylava.models.registry import VisionSpec
from raylava.models.templates import IMAGE_TOKEN


def make_sample(
    row: SourceRow,
    read_image: Callable[[str | bytes], bytes],
    chat_tokenizer: ChatTokenizer,
    corpus: Corpus,
    vision: VisionSpec,
) -> tuple[Sample, bool]:
    """Return the sample of a row, and whether it was truncated. Raises BadRow when the row must be quarantined.

    Cheap checks run first, so that no image is read for a row that fails them. `read_image` is an ImageReader.
    """
    characters = sum(len(turn.text) for turn in row.turns)
    if characters > corpus.max_chars:
        raise BadRow(Reason.TOO_LONG, f"{characters} characters, more than max_chars={corpus.max_chars}")
    check_turns(row.turns, len(row.images))
    chat, truncated = _tokenize_within_limit(row, chat_tokenizer, corpus, vision.image_tokens)
    images = [
        prepare_image(
            read_image(image),
            vision.pixels,
            corpus.image_aspect,
            corpus.image_encoding,
            corpus.max_pixels,
        )
        for image in row.images[: chat.image_count]
    ]
    return Sample(row.sample_id, chat.input_ids, chat.loss_spans, images, chat.length(vision.image_tokens)), truncated


def _tokenize_within_limit(
    row: SourceRow, chat_tokenizer: ChatTokenizer, corpus: Corpus, image_tokens: int
) -> tuple[TokenizedChat, bool]:
    """Tokenize a row to at most `max_length` tokens, image tokens included; return also whether it was truncated.

    Raises BadRow when it is too long and `on_overlong` leaves nothing of it that the loss covers.
    """
    chat = _tokenize(row, len(row.turns), chat_tokenizer)
    length = chat.length(image_tokens)
    if length <= corpus.max_length:
        return chat, False
    if corpus.on_overlong == "truncate_tokens":
        return _truncate_tokens(chat, chat_tokenizer, corpus, image_tokens), True
    if corpus.on_overlong == "truncate_exchanges":
        return _truncate_exchanges(row, length, chat_tokenizer, corpus, image_tokens), True
    raise _too_long(length, corpus)


def _truncate_tokens(
    chat: TokenizedChat, chat_tokenizer: ChatTokenizer, corpus: Corpus, image_tokens: int
) -> TokenizedChat:
    """Cut the conversation at the token, as LLaVA does."""
    cut = chat.truncate(corpus.max_length, chat_tokenizer.image_id, image_tokens)
    if not cut.loss_spans:
        length = chat.length(image_tokens)
        detail = f"{length} tokens, and no answer within the first {corpus.max_length} (max_length)"
        raise BadRow(Reason.NOTHING_SUPERVISED, detail)
    return cut


def _truncate_exchanges(
    row: SourceRow, length: int, chat_tokenizer: ChatTokenizer, corpus: Corpus, image_tokens: int
) -> TokenizedChat:
    """Drop whole exchanges from the end of `length` tokens until the rest fits, with the images they refer to."""
    for turn_count in range(len(row.turns) - 2, 0, -2):
        chat = _tokenize(row, turn_count, chat_tokenizer)
        length = chat.length(image_tokens)
        if length <= corpus.max_length:
            return chat
    raise _too_long(length, corpus)


def _too_long(length: int, corpus: Corpus) -> BadRow:
    return BadRow(Reason.TOO_LONG, f"{length} tokens, more than max_length={corpus.max_length}")


def _tokenize(row: SourceRow, turn_count: int, chat_tokenizer: ChatTokenizer) -> TokenizedChat:
    turns = row.turns[:turn_count]
    return chat_tokenizer.encode(turns, sum(turn.text.count(IMAGE_TOKEN) for turn in turns))
