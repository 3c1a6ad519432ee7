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
    images = [_prepare_image(image, read_image, corpus, vision) for image in row.images[: chat.image_count]]
    return Sample(row.sample_id, chat.input_ids, chat.loss_spans, images, chat.length(vision.image_tokens)), truncated


def _prepare_image(
    image: str | bytes, read_image: Callable[[str | bytes], bytes], corpus: Corpus, vision: VisionSpec
) -> bytes:
    """Return an image as blocks store it. Raises BadRow, which names the image."""
    try:
        return prepare_image(
            read_image(image), vision.pixels, corpus.image_aspect, corpus.image_encoding, corpus.max_pixels
        )
    except BadRow as bad:
        bad.image = image if isinstance(image, str) else ""
        raise


def _tokenize_within_limit(
    row: SourceRow, chat_tokenizer: ChatTokenizer, corpus: Corpus, image_tokens: int
) -> tuple[TokenizedChat, bool]:
    """Tokenize a row to at most `max_length` tokens, image tokens included; return also whether it was truncated.

    Raises BadRow when it is too long and `on_overlong` leaves nothing of it that the loss covers.
    """
    chat = chat_tokenizer.encode(row.turns, sum(turn.text.count(IMAGE_TOKEN) for turn in row.turns))
    length = chat.length(image_tokens)
    if length <= corpus.max_length:
        return chat, False
    if corpus.on_overlong == "truncate_tokens":
        return _truncate_tokens(chat, chat_tokenizer, corpus, image_tokens), True
    if corpus.on_overlong == "truncate_exchanges":
        return _truncate_exchanges(row, chat, chat_tokenizer, corpus, image_tokens), True
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
    row: SourceRow, chat: TokenizedChat, chat_tokenizer: ChatTokenizer, corpus: Corpus, image_tokens: int
) -> TokenizedChat:
    """Drop whole exchanges from the end until the rest fits, with the images they refer to."""
    image_id = chat_tokenizer.image_id
    lengths = list(chat.expanded_lengths(image_id, image_tokens))
    for exchanges in range(len(chat.loss_spans) - 1, 0, -1):
        stop = chat.loss_spans[exchanges - 1][1]
        if lengths[stop - 1] <= corpus.max_length:
            ids = chat.input_ids[:stop]
            check_turns(row.turns[: 2 * exchanges], ids.count(image_id))
            return TokenizedChat(ids, chat.loss_spans[:exchanges], ids.count(image_id))
    raise _too_long(lengths[chat.loss_spans[0][1] - 1], corpus)


def _too_long(length: int, corpus: Corpus) -> BadRow:
    return BadRow(Reason.TOO_LONG, f"{length} tokens, more than max_length={corpus.max_length}")
