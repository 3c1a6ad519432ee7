"""Turns one parsed source row into one training sample: checks, tokenization within `max_length`, image reading.

Needs no Ray; prepare.py calls it for every row.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path

from raylava.config.recipe import Corpus
from raylava.corpus.blocks import Sample
from raylava.corpus.conversation import ChatTokenizer, TokenizedChat, check_turns
from raylava.corpus.fetch import FetchedImage, fetched_content, is_url
from raylava.corpus.images import prepare_image
from raylava.corpus.quarantine import BadRow, Reason
from raylava.corpus.sources import SourceRow, resolve_image_path
from raylava.models.registry import VisionSpec
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import StoragePath


def make_sample(
    row: SourceRow,
    image_root: StoragePath,
    chat_tokenizer: ChatTokenizer,
    corpus: Corpus,
    vision: VisionSpec,
    fetched: Mapping[str, FetchedImage] | None = None,
) -> tuple[Sample, bool]:
    """Return the sample of a row, and whether it was truncated. Raises BadRow when the row must be quarantined.

    Cheap checks run first, so that no image is read for a row that fails them. `fetched` has the images that are named
    by URL.
    """
    check_turns(row.turns, len(row.images))
    chat, truncated = _tokenize_within_limit(row, chat_tokenizer, corpus, vision.image_tokens)
    images = [
        prepare_image(
            _image_content(image, image_root, fetched or {}),
            vision.pixels,
            corpus.image_aspect,
            corpus.image_encoding,
            corpus.max_pixels,
        )
        for image in row.images[: chat.image_count]
    ]
    return Sample(row.sample_id, chat.input_ids, chat.loss_spans, images, chat.length(vision.image_tokens)), truncated


def _image_content(image: str | bytes, root: StoragePath, fetched: Mapping[str, FetchedImage]) -> bytes:
    if isinstance(image, bytes):
        return image
    return fetched_content(image, fetched) if is_url(image) else _read_image(root, image)


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


def _read_image(root: StoragePath, name: str) -> bytes:
    """Read an image below `root`. Raises OSError when `root` itself is missing, else BadRow."""
    file = resolve_image_path(root, name)
    if root.is_local:
        _reject_escaping_link(root, file, name)
    try:
        return file.read_bytes()
    except OSError as error:
        if not root.exists():  # the image folder is gone, which is not the fault of this row
            raise
        if isinstance(error, FileNotFoundError):
            raise BadRow(Reason.IMAGE_MISSING, name) from error
        if file.is_folder():
            raise BadRow(Reason.IMAGE_MISSING, f"{name} is a folder") from error
        raise BadRow(Reason.IMAGE_UNREADABLE, f"{name}: {error}"[:200]) from error


def _reject_escaping_link(root: StoragePath, file: StoragePath, name: str) -> None:
    folder, _, base = file.path.rpartition("/")
    resolved = Path(file.path).resolve() if os.path.islink(file.path) else _resolve_folder(folder) / base
    if not resolved.is_relative_to(_resolve_folder(root.path)):
        raise BadRow(Reason.PATH_ESCAPES, f"{name} is a link out of the image folder")


@functools.lru_cache(maxsize=4096)
def _resolve_folder(path: str) -> Path:
    """Resolve the links of a folder's path; cached, because resolving takes longer than reading a small image."""
    return Path(path).resolve()
