"""Commands that show what was made: show, inspect, replay."""

import argparse
import json
from pathlib import Path

from raylava.cli.command import Add, Outcome
from raylava.console import Console
from raylava.errors import UserError


def register(add: Add) -> None:
    """Add these commands."""
    show = add("show", _show, "print what made an artifact")
    show.add_argument("artifact", metavar="PATH")
    inspect = add("inspect", _inspect, "show what went into a prepared corpus, as figures and as a page")
    inspect.add_argument("artifact", metavar="PATH")
    inspect.add_argument("--samples", type=int, default=24, metavar="N", help="samples on the page (%(default)s)")
    inspect.add_argument("--html", metavar="FILE", help="where the page goes (inspect-FINGERPRINT.html)")
    replay = add("replay", _replay, "compute each sample of a step that was not finite alone")
    replay.add_argument("folder", metavar="FOLDER", help="the replay-step folder that a stopped run names")


def _show(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.artifacts import load

    record = load(arguments.artifact).record
    return Outcome(record, json.dumps(record, indent=2, ensure_ascii=False))


def _inspect(arguments: argparse.Namespace, console: Console) -> Outcome:
    from transformers import AutoTokenizer

    from raylava.artifacts import load
    from raylava.cli.tables import corpus_table
    from raylava.corpus.blocks import TOKENIZER
    from raylava.corpus.inspect import inspect, page

    artifact = load(arguments.artifact)
    if artifact.stage != "prepare":
        raise UserError(f"{arguments.artifact}: an artifact of {artifact.stage}; inspect shows those of prepare")
    found = inspect(artifact.path, arguments.samples, seed=0)
    tokenizer = AutoTokenizer.from_pretrained((artifact.path / TOKENIZER).local_copy())
    file = Path(arguments.html or f"inspect-{artifact.fingerprint}.html")
    file.write_text(page(found, f"prepare {artifact.fingerprint}", tokenizer), encoding="utf-8")
    console.show(corpus_table(found))
    data = artifact.metrics | {
        "histogram": found.histogram,
        "by_source": found.quarantined_by_source,
        "page": str(file),
    }
    return Outcome(data, f"page: {file}")


def _replay(arguments: argparse.Namespace, console: Console) -> Outcome:
    from dataclasses import asdict

    from raylava.cli.tables import replay_table
    from raylava.storage import storage_path
    from raylava.train.replay import replay

    found = list(replay(storage_path(arguments.folder)))
    console.show(replay_table(found))
    bad = [one.sample_id for one in found if not one.finite]
    told = f"{len(bad)} of {len(found)} samples are not finite alone" + (f": {', '.join(bad[:5])}" if bad else "")
    return Outcome({"samples": [asdict(one) for one in found]}, told)
