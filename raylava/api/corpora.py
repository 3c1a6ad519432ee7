"""Prepared corpora as sequences of samples, and the demo's corpus and backbones."""

import sys

from raylava.api import DEFAULT_STORAGE
from raylava.console import Console
from raylava.corpus import block_cache
from raylava.corpus.blocks import Blocks
from raylava.storage import storage_path


def open_blocks(path: str) -> Blocks:
    """Open a prepared corpus, the artifact of a `prepare` stage, as a sequence of samples.

    `blocks[k]` is a Sample: `input_ids` (tokens, int32), `loss_spans` (start and stop of the tokens in the loss),
    `images` (encoded files) and `sample_id`. `blocks.lengths` has the lengths of all samples, `blocks.manifest` the
    counts. Blocks in a bucket are copied to the node's cache when they are first read. Raises UserError if there is no
    prepared corpus at the path.
    """
    return block_cache.open_blocks(storage_path(path))


def make_toy_assets(storage: str = DEFAULT_STORAGE, console: Console | None = None) -> str:
    """Build the demo's corpus and small backbones, unless the storage has them; return their folder.

    The folder holds `corpus` (alignment.json, instruction.json, questions.jsonl, images), `backbones/gemma` and
    `backbones/clip`. Takes about a minute on two CPU cores.
    """
    from raylava.toy import demo

    return str(demo.make_toy_assets(storage, console or Console(sys.stderr)).path)
