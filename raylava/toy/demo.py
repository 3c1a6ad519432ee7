"""`raylava demo`: builds the toy assets, runs a regular recipe on them, and shows a few answers with their images."""

import json
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from raylava.artifacts import Artifact
from raylava.cluster.session import ray_session
from raylava.config.load import load_recipe
from raylava.config.recipe import Recipe, Resources
from raylava.config.shipped import recipes_folder
from raylava.console import Console, escape
from raylava.evaluation.generation import decode_answers
from raylava.evaluation.metrics.exact_match import is_exact_match
from raylava.pipeline.report import show_results
from raylava.pipeline.results import summarize
from raylava.pipeline.run_report.page import report_run
from raylava.pipeline.runner import run
from raylava.pipeline.stage import Stage, run_stage
from raylava.storage import StoragePath, writable
from raylava.toy.assets import ABLATION_PARTS, DEMO_PARTS, ToyAssetsStage, ToySize

SEED = 0  # of the toy assets that `raylava toy` builds
_SHOWN_ANSWERS = 3
_EVALUATE_STAGE = "evaluate heldout"


def demo(
    storage: str, overrides: list[str], console: Console, size: ToySize | None = None, seed: int = SEED
) -> dict[str, Any]:
    """Run the demo and return the JSON summary of all its artifacts.

    `seed` draws the corpus and the questions, and initializes the backbones and the training.
    """
    started, root = time.time(), writable(storage)
    stage = ToyAssetsStage(root, size or ToySize(), seed, DEMO_PARTS)
    with _session_for(stage):  # the recipe's stages join the Ray cluster that builds the toy assets
        toy_assets = run_stage(stage, console)
        recipe = toy_recipe(toy_assets.path, [f"seed={seed}", *overrides])
        artifacts = run(recipe, root, console)
    if _EVALUATE_STAGE in artifacts:
        show_answers(artifacts[_EVALUATE_STAGE], console)
    show_results(artifacts, console)
    console.say("       raylava demo pretrain.enabled=false   [dim](the same, without connector pretraining)[/]")
    report_run(
        recipe,
        artifacts,
        root,
        ["raylava", "demo", "--seed", str(seed), *overrides, "--storage", storage],
        started,
        console,
    )
    return summarize({"toy-assets": toy_assets} | artifacts)


def make_toy_assets(storage: str, console: Console) -> Artifact:
    """Build the demo's corpus and backbones unless they exist, and return their artifact."""
    return _make(ToyAssetsStage(writable(storage), ToySize(), SEED, DEMO_PARTS), console)


def make_ablation_backbones(storage: str, console: Console) -> Artifact:
    """Build the backbones of the toy ablations that the demo lacks unless they exist, and return their artifact."""
    return _make(ToyAssetsStage(writable(storage), ToySize(), SEED, ABLATION_PARTS), console)


def _make(stage: Stage, console: Console) -> Artifact:
    with _session_for(stage):
        return run_stage(stage, console)


def _session_for(stage: Stage) -> AbstractContextManager[None]:
    """Return a Ray session, or an empty context when the stage's artifact exists already."""
    return nullcontext() if stage.spec().find() else ray_session(Resources(workers=2))


def toy_recipe(toy_assets: StoragePath, overrides: list[str]) -> Recipe:
    """Load jobs/recipes/toy.yaml for the corpus and backbones of a toy-assets artifact."""
    paths = [
        f"data={toy_assets / 'corpus'}",
        f"model.language.name={toy_assets / 'backbones' / 'gemma'}",
        f"model.vision.name={toy_assets / 'backbones' / 'clip'}",
    ]
    return load_recipe(str(recipes_folder() / "toy.yaml"), [*paths, *overrides])


def show_answers(evaluation: Artifact, console: Console) -> None:
    """Print the first questions with their answers; the report of the run shows all of them with their images."""
    questions = [json.loads(line) for line in (evaluation.path / "questions.jsonl").read_bytes().splitlines()]
    answers = list(decode_answers((evaluation.path / "answers.jsonl").read_bytes()))
    console.say("")
    for question, answer in zip(questions[:_SHOWN_ANSWERS], answers[:_SHOWN_ANSWERS], strict=True):
        mark = "[green]✓[/]" if is_exact_match(answer["text"], question["references"]) else "[red]✗[/]"
        console.say(
            f"  {mark} [dim]{escape(question['image'])}[/]  {escape(question['text'])}  "
            f"[bold]{escape(answer['text'])}[/]"
        )
