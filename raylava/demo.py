"""`raylava demo`: the laboratory, an ordinary recipe through the ordinary stages, and what a person wants to see."""

import base64
import html
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.markup import escape

from raylava.artifacts import Artifact
from raylava.console import Console
from raylava.errors import UserError
from raylava.evaluate.answer import read_answers
from raylava.evaluate.score.exact import matches
from raylava.micro.laboratory import LaboratorySize, laboratory
from raylava.recipe import Recipe, Resources
from raylava.recipe_file import load_recipe
from raylava.report import closing, summary
from raylava.session import ray_session
from raylava.stage import make
from raylava.stages import run
from raylava.storage import Place, writable

SEED = 0
SHEET = "answers.html"
_SHOWN = 3
_ANSWERS = "evaluate heldout"


def demo(storage: str, overrides: list[str], console: Console, size: LaboratorySize | None = None) -> dict[str, Any]:
    """Run the demo; returns the JSON of its stages, the laboratory's included."""
    root = writable(storage)
    stage = laboratory(root, size or LaboratorySize(), SEED)
    with (
        nullcontext() if stage.draft.find() else ray_session(Resources(workers=2))
    ):  # one Ray for both when both are new
        made = make(stage, console)
        recipe = micro_recipe(made.place, overrides)
        artifacts = run(recipe, root, console)
    if _ANSWERS in artifacts:
        sheet = write_sheet(artifacts[_ANSWERS], made.place / "corpus" / "pictures", console)
        console.say(f"sheet: [bold]{escape(str(sheet))}[/]   (the questions above, with their pictures)")
    closing(artifacts, console)
    console.say("       raylava demo pretrain.enabled=false   [dim](the same, without connector pretraining)[/]")
    return summary({"laboratory": made} | artifacts)


def make_laboratory(storage: str, console: Console) -> Artifact:
    """The demo's corpus and backbones, made unless they are there."""
    stage = laboratory(writable(storage), LaboratorySize(), SEED)
    with nullcontext() if stage.draft.find() else ray_session(Resources(workers=2)):
        return make(stage, console)


def micro_recipe(laboratory: Place, overrides: list[str]) -> Recipe:
    """jobs/recipes/micro.yaml on a laboratory's corpus and backbones."""
    places = [
        f"data={laboratory / 'corpus'}",
        f"model.language.name={laboratory / 'backbones' / 'gemma'}",
        f"model.vision.name={laboratory / 'backbones' / 'clip'}",
    ]
    return load_recipe(str(recipes_folder() / "micro.yaml"), [*places, *overrides])


def recipes_folder() -> Path:
    """Where the shipped recipes lie: in the wheel, or in the checkout that raylava is installed from."""
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parent / "jobs" / "recipes"):
        if folder.is_dir():
            return folder
    raise UserError("the shipped recipes are missing from this installation; install raylava again")


def write_sheet(evaluation: Artifact, pictures: Place, console: Console) -> Place:
    """Three questions with their answers: told here, and with pictures as a self-contained page."""
    questions = [json.loads(line) for line in (evaluation.place / "questions.jsonl").read_bytes().splitlines()]
    answers = list(read_answers((evaluation.place / "answers.jsonl").read_bytes()))
    shown = list(zip(questions[:_SHOWN], answers[:_SHOWN], strict=True))
    console.say("")
    for question, answer in shown:
        mark = "[green]✓[/]" if matches(answer["text"], question["references"]) else "[red]✗[/]"
        console.say(
            f"  {mark} [dim]{question['image']}[/]  {escape(question['text'])}  [bold]{escape(answer['text'])}[/]"
        )
    sheet = evaluation.place / SHEET
    sheet.write_bytes(_page([_card(question, answer, pictures) for question, answer in shown]).encode())
    return sheet


def _card(question: dict[str, Any], answer: dict[str, Any], pictures: Place) -> str:
    picture = base64.b64encode((pictures / question["image"]).read_bytes()).decode()
    right = matches(answer["text"], question["references"])
    return (
        f'<figure><img src="data:image/png;base64,{picture}" alt="{html.escape(question["image"])}">'
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
<p>Pictures it had not seen in training.</p>
<main>{"".join(cards)}</main></html>
"""
