"""`raylava demo`: builds the toy assets, runs a regular recipe on them, and shows a few answers with their images."""

import base64
import html
import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from raylava.artifacts import Artifact
from raylava.cluster.session import ray_session
from raylava.config.load import load_recipe
from raylava.config.recipe import Recipe, Resources
from raylava.config.shipped import recipes_folder
from raylava.console import Console, escape
from raylava.evaluate.generation import decode_answers
from raylava.evaluate.metrics.exact_match import is_exact_match
from raylava.pipeline.report import show_results
from raylava.pipeline.results import summarize
from raylava.pipeline.runner import run
from raylava.pipeline.stage import Stage, run_stage
from raylava.storage import StoragePath, writable
from raylava.toy.assets import ABLATION_PARTS, DEMO_PARTS, ToyAssetsStage, ToySize

SEED = 0  # of the toy assets that `raylava toy` builds
ANSWER_SHEET = "answers.html"
_SHEET_QUESTIONS = 3
_EVALUATE_STAGE = "evaluate heldout"


def demo(
    storage: str, overrides: list[str], console: Console, size: ToySize | None = None, seed: int = SEED
) -> dict[str, Any]:
    """Run the demo and return the JSON summary of all its artifacts.

    `seed` draws the corpus and the questions, and initializes the backbones and the training.
    """
    root = writable(storage)
    stage = ToyAssetsStage(root, size or ToySize(), seed, DEMO_PARTS)
    with _session_for(stage):  # the recipe's stages join the Ray cluster that builds the toy assets
        toy_assets = run_stage(stage, console)
        artifacts = run(toy_recipe(toy_assets.path, [f"seed={seed}", *overrides]), root, console)
    if _EVALUATE_STAGE in artifacts:
        sheet = write_answer_sheet(artifacts[_EVALUATE_STAGE], toy_assets.path / "corpus" / "images", console)
        console.say(f"answers: [bold]{escape(str(sheet))}[/]   (the questions above, with their images)")
    show_results(artifacts, console)
    console.say("       raylava demo pretrain.enabled=false   [dim](the same, without connector pretraining)[/]")
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


def write_answer_sheet(evaluation: Artifact, images: StoragePath, console: Console) -> StoragePath:
    """Print the first questions with their answers, and write them with their images as a self-contained HTML page.

    Returns the path of the page. `images` is the folder of the questions' images.
    """
    questions = [json.loads(line) for line in (evaluation.path / "questions.jsonl").read_bytes().splitlines()]
    answers = list(decode_answers((evaluation.path / "answers.jsonl").read_bytes()))
    pairs = list(zip(questions[:_SHEET_QUESTIONS], answers[:_SHEET_QUESTIONS], strict=True))
    console.say("")
    for question, answer in pairs:
        mark = "[green]✓[/]" if is_exact_match(answer["text"], question["references"]) else "[red]✗[/]"
        console.say(
            f"  {mark} [dim]{escape(question['image'])}[/]  {escape(question['text'])}  "
            f"[bold]{escape(answer['text'])}[/]"
        )
    sheet = evaluation.path / ANSWER_SHEET
    sheet.write_bytes(_page([_card(question, answer, images) for question, answer in pairs]).encode())
    return sheet


def _card(question: dict[str, Any], answer: dict[str, Any], images: StoragePath) -> str:
    image = base64.b64encode((images / question["image"]).read_bytes()).decode()
    correct = is_exact_match(answer["text"], question["references"])
    return (
        f'<figure><img src="data:image/png;base64,{image}" alt="{html.escape(question["image"])}">'
        f"<figcaption><p>{html.escape(question['text'])}</p>"
        f'<p class="{"correct" if correct else "wrong"}">{html.escape(answer["text"]) or "(empty)"}</p>'
        f"<small>correct answer: {html.escape(question['references'][0])}</small></figcaption></figure>"
    )


def _page(cards: list[str]) -> str:
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>raylava demo: answers</title>
<style>
  body {{ font: 16px/1.45 system-ui, sans-serif; margin: 3rem auto; max-width: 60rem; padding: 0 1rem; color: #1d1d22 }}
  main {{ display: flex; flex-wrap: wrap; gap: 1.5rem }}
  figure {{ margin: 0; width: 17rem; border: 1px solid #dcdce4; border-radius: .75rem; overflow: hidden }}
  img {{ width: 100%; display: block; image-rendering: pixelated }}
  figcaption {{ padding: .75rem 1rem 1rem }}
  p {{ margin: 0 0 .3rem }} .correct, .wrong {{ font-weight: 650; font-size: 1.2rem }}
  .correct {{ color: #17743a }} .wrong {{ color: #b3261e }} small {{ color: #6b6b76 }}
</style>
<h1>What the model answered</h1>
<p>These images are not part of the training data.</p>
<main>{"".join(cards)}</main></html>
"""
