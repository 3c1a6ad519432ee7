"""Commands that make artifacts: demo, run, sweep, train, toy assets."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from raylava.cli.command import Add, Outcome, takes_overrides, takes_recipe
from raylava.cli.estimating import sweep_hours, takes_cluster, takes_corpora
from raylava.console import Console
from raylava.errors import UserError

if TYPE_CHECKING:
    from raylava.config.recipe import Recipe


def register(add: Add) -> None:
    """Add these commands."""
    demo = add("demo", _demo, "train a small LLaVA on drawn images and ask it about others, in minutes")
    takes_overrides(demo)
    run = add("run", _run_recipe, "make every artifact of a recipe that is missing")
    run.add_argument("--only", metavar="STAGE", choices=("prepare",), help="prepare: the corpora alone")
    takes_recipe(run)
    sweep = add("sweep", _sweep, "make every variant of a sweep, each piece of work once")
    sweep.add_argument("sweep", metavar="SWEEP.yaml")
    sweep.add_argument("--plan", action="store_true", help="show what it comes to, and make nothing")
    takes_cluster(sweep.add_argument_group("where the plan's hours are counted"))
    takes_corpora(sweep.add_argument_group("what is known of corpora that are not prepared"))
    takes_overrides(sweep)
    train = add("train", _train, "train one stage without Ray: as one process, or under `torchrun --no-python`")
    train.add_argument("recipe", metavar="RECIPE.yaml")
    train.add_argument("stage", metavar="STAGE", choices=("pretrain", "finetune"))
    takes_overrides(train)
    toy_assets = add("toy-assets", _laboratory, "make the demo's corpus and backbones in a folder")
    toy_assets.add_argument("folder", metavar="FOLDER")


def _demo(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.toy.demo import demo

    return Outcome(demo(arguments.storage, arguments.overrides, console))


def _run_recipe(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.cli.tables import closing, summary
    from raylava.config.load import load_recipe
    from raylava.pipeline.stages import run
    from raylava.storage import writable

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    artifacts = run(recipe, writable(arguments.storage), console, arguments.only)
    closing(artifacts, console)
    return Outcome(summary(artifacts))


def _train(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.config.load import load_recipe
    from raylava.pipeline.stages import train_standalone
    from raylava.storage import writable

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    artifact = train_standalone(recipe, writable(arguments.storage), arguments.stage, console)
    return Outcome(artifact.record if artifact else {})


def _sweep(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.errors import RunError
    from raylava.storage import writable
    from raylava.tune.report import write_report
    from raylava.tune.results import SweepResults
    from raylava.tune.runner import SweepRun
    from raylava.tune.sweep import load_sweep
    from raylava.tune.sweep_plan import plan, plan_of
    from raylava.tune.tables import plan_table, results_table

    sweep, storage = load_sweep(arguments.sweep), writable(arguments.storage)
    run = SweepRun(sweep, arguments.overrides, storage)
    expected = plan(run.expected(), storage)
    console.show(plan_table(expected))
    if arguments.plan:
        hours = _hours(sweep.name, [one.recipe for one in expected.variants], arguments, console)
        return Outcome({"works": [vars(work) for work in expected.works], "hours": hours})
    ended = run.run(console)
    findings = SweepResults(sweep, arguments.overrides, plan_of(ended, storage), ended)
    write_report(findings, run.folder)
    console.show(results_table(findings))
    console.say(f"report: [bold]{escape(str(run.folder / 'report.html'))}[/]   (report.md and results.csv beside it)")
    failed = [one for one in ended if one.how == "failed"]
    if failed:
        raise RunError(f"{len(failed)} of {len(ended)} trials failed, the first: {failed[0].failure}")
    return Outcome({"results": findings.table(), "folder": run.folder.uri})


def _hours(name: str, recipes: "list[Recipe]", arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """What the plan will take, where enough is known of its corpora to say it."""
    try:
        return sweep_hours(name, recipes, arguments, console)
    except UserError as error:
        console.say(f"[dim]how long it takes is not known: {escape(str(error))}[/]")
        return {}


def _laboratory(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.toy.demo import make_toy_assets

    made = make_toy_assets(arguments.storage, console)
    folder = Path(arguments.folder)
    if folder.is_symlink() and folder.resolve().parent.name == made.stage:
        folder.unlink()  # this toy assets's or an earlier one's
    elif folder.exists():
        raise UserError(f"{folder}: is there already and is no toy_assets; name a new folder")
    folder.symlink_to(made.path.local_copy(), target_is_directory=True)
    return Outcome(
        {"toy-assets": str(made.path)}, f"{folder}: corpus and backbones; next: raylava run jobs/recipes/toy.yaml"
    )
