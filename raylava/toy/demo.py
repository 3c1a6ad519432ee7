"""`raylava demo`: the toy assets, an ordinary recipe through the ordinary stages, and what a person wants to see."""

import base64
import html
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.markup import escape

from raylava.artifacts import Artifact
from raylava.cli.tables import closing, summary
from raylava.cluster.session import ray_session
from raylava.config.load import load_recipe
from raylava.config.recipe import Recipe, Resources
from raylava.console import Console
from raylava.errors import UserError
from raylava.evaluate.generation import read_answers
from raylava.evaluate.metrics.exact_match import matches
from raylava.pipeline.stage import run_stage
from raylava.pipeline.stages import run
from raylava.storage import StoragePath, writable
from raylava.toy.assets import ToySize, toy_assets_stage

SEED = 0
SHEET = "answers.html"
_SHOWN = 3
_ANSWERS = "evaluate heldout"


def demo(storage: str, overrides: list[str], console: Console, size: ToySize | None = None) -> dict[str, Any]:
    """Run the demo; returns the JSON of its stages, the toy assets's included."""
    root = writable(storage)
    stage = toy_assets_stage(root, size or ToySize(), SEED)
    with (
        nullcontext() if stage.spec.find() else ray_session(Resources(workers=2))
    ):  # one Ray for both when both are new
        made = run_stage(stage, console)
        recipe = toy_recipe(made.path, overrides)
        artifacts = run(recipe, root, console)
    if _ANSWERS in artifacts:
        sheet = write_sheet(artifacts[_ANSWERS], made.path / "corpus" / "images", console)
        console.say(f"sheet: [bold]{escape(str(sheet))}[/]   (the questions above, with their images)")
    closing(artifacts, console)
    console.say("       raylava demo pretrain.enabled=false   [dim](the same, without connector pretraining)[/]")
    return summary({"toy-assets": made} | artifacts)


def make_toy_assets(storage: str, console: Console) -> Artifact:
    """The demo's corpus and backbones, made unless they are there."""
    stage = toy_assets_stage(writable(storage), ToySize(), SEED)
    with nullcontext() if stage.spec.find() else ray_session(Resources(workers=2)):
        return run_stage(stage, console)


def toy_recipe(toy_assets: StoragePath, overrides: list[str]) -> Recipe:
    """jobs/recipes/toy.yaml on a toy assets's corpus and backbones."""
    places = [
        f"data={toy_assets / 'corpus'}",
        f"model.language.name={toy_assets / 'backbones' / 'gemma'}",
        f"model.vision.name={toy_assets / 'backbones' / 'clip'}",
    ]
    return load_recipe(str(recipes_folder() / "toy.yaml"), [*places, *overrides])


def recipes_folder() -> Path:
    """Where the shipped recipes lie: in the wheel, or in the checkout that raylava is installed from."""
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parent / "jobs" / "recipes"):
        if folder.is_dir():
            return folder
    raise UserError("the shipped recipes are missing from this installation; install raylava again")


def write_sheet(evaluation: Artifact, images: StoragePath, console: Console) -> StoragePath:
    """Three questions with their answers: told here, and with images as a self-contained page."""
    questions = [json.loads(line) for line in (evaluation.path / "questions.jsonl").read_bytes().splitlines()]
    answers = list(read_answers((evaluation.path / "answers.jsonl").read_bytes()))
    shown = list(zip(questions[:_SHOWN], answers[:_SHOWN], strict=True))
    console.say("")
    for question, answer in shown:
        mark = "[green]✓[/]" if matches(answer["text"], question["references"]) else "[red]✗[/]"
        console.say(
            f"  {mark} [dim]{question['image']}[/]  {escape(question['text'])}  [bold]{escape(answer['text'])}[/]"
        )
    sheet = evaluation.path / SHEET
    sheet.write_bytes(_page([_card(question, answer, images) for question, answer in shown]).encode())
    return sheet


def _card(question: dict[str, Any], answer: dict[str, Any], images: StoragePath) -> str:
    image = base64.b64encode((images / question["image"]).read_bytes()).decode()
    right = matches(answer["text"], question["references"])
    return (
        f'<figure><img src="data:image/png;base64,{image}" alt="{html.escape(question["image"])}">'
        f"<figcaption><p>{html.escape(question['text'])}</p>"
        f'<p class="{"right" if right else "wrong"}">{html.escape(answer["text"]) or "(nothing)"}</p>'
        f"<small>right answer: {html.escape(question['references'][0])}</small></figcaption></figure>"
    )


def _page(cards: list[str]) -> str:
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>raylava demo: answers</title>
<style>
  body {{ font: 16px/1.45 system-ui, sans-serif; margin: 3rem auto; max-width: 60rem; padding: 0 1rem; color: #1d1d22 }}
  main {{ display: flex; flex-wrap: wrap; gap: 1.5rem }}
  figure {{ margin: 0; width: 17rem; border: 1px solid #dcdce4; border-radius: .75rem; overflow: hidden }}
  img {{ width: 100%; display: block; image-rendering: pixelated }}
  figcaption {{ padding: .75rem 1rem 1rem }}
  p {{ margin: 0 0 .3rem }} .right, .wrong {{ font-weight: 650; font-size: 1.2rem }}
  .right {{ color: #17743a }} .wrong {{ color: #b3261e }} small {{ color: #6b6b76 }}
</style>
<h1>What the model answered</h1>
<p>Images it had not seen in training.</p>
<main>{"".join(cards)}</main></html>
"""
