"""The commands: arguments in, one call out, errors told in one line.

Exit status 0 when it worked, 1 when a run failed, 2 when what was given is wrong. Results go to standard output (one
JSON object with --json), everything else to standard error.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from rich.markup import escape

from raylava.console import Console, quiet
from raylava.errors import UserError, first_line
from raylava.storage import cache_folder

if TYPE_CHECKING:
    from raylava.recipe import Recipe

logger = logging.getLogger("raylava.cli")  # not __name__, which `python -m` makes __main__: its lines would be lost

DEFAULT_STORAGE = "raylava-storage"

Handler = Callable[[argparse.Namespace, Console], "Outcome"]


class Outcome:
    """What a command found: `data` for programs, `text` for people on standard output (None: all was already shown)."""

    def __init__(self, data: dict[str, Any], text: str | None = None) -> None:
        self.data, self.text = data, text


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    try:
        arguments = _parse(argv)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    log = (
        cache_folder()
        / "logs"
        / f"{arguments.command}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}.log"
    )
    with quiet(log) as (out, console):
        return _run(arguments, out, console)


def job(command: str, subject: str, *fixed: str) -> int:
    """A command as jobs/ calls it, what it is about given as an option (`--recipe FILE`); returns its exit status."""
    from raylava.cluster.jobs import check_shared

    parser = argparse.ArgumentParser(description=f"raylava {command}, as a job", add_help=False)
    parser.add_argument(subject, dest="subject", required=True)
    parser.add_argument("--storage", required=True)
    given, rest = parser.parse_known_args()
    try:
        check_shared(given.storage)
    except UserError as error:
        parser.error(str(error))
    return main([command, given.subject, *fixed, "--storage", given.storage, *rest])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes overrides only where they stand together; people also put them after options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not all("=" in one and not one.startswith("-") and hasattr(arguments, "overrides") for one in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _run(arguments: argparse.Namespace, out: IO[str], console: Console) -> int:
    try:
        outcome: Outcome = arguments.handler(arguments, console)
    except UserError as error:
        console.error(first_line(error))
        return 2
    except KeyboardInterrupt:
        console.error("stopped; the same command goes on from what is finished")
        return 130
    except Exception as error:  # told in one line; the log file has the rest
        logger.info("the command failed", exc_info=error)
        console.error(first_line(error))
        console.say(f"[dim]all that was written on the way: {console.log}[/]")
        return 1
    if arguments.json:
        out.write(json.dumps(outcome.data, ensure_ascii=False) + "\n")
    elif outcome.text is not None:
        out.write(outcome.text.rstrip("\n") + "\n")
    return 0


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument(
        "--storage", metavar="URI", default=DEFAULT_STORAGE, help="where artifacts are kept (%(default)s)"
    )
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser = _Parser(
        prog="raylava", description="LLaVA-Gemma on Ray: corpora in, a Hugging Face model and its scores out."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, handler: Handler, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[common], help=about, description=about)
        added.set_defaults(handler=handler)
        return added

    demo = command("demo", _demo, "train a small LLaVA on drawn pictures and ask it about others, in minutes")
    _takes_overrides(demo)
    run = command("run", _run_recipe, "make every artifact of a recipe that is missing")
    run.add_argument("--only", metavar="STAGE", choices=("prepare",), help="prepare: the corpora alone")
    _takes_recipe(run)
    sweep = command("sweep", _sweep, "make every variant of a sweep, each piece of work once")
    sweep.add_argument("sweep", metavar="SWEEP.yaml")
    sweep.add_argument("--plan", action="store_true", help="show what it comes to, and make nothing")
    _takes_overrides(sweep)
    train = command("train", _train, "train one stage without Ray: as one process, or under `torchrun --no-python`")
    train.add_argument("recipe", metavar="RECIPE.yaml")
    train.add_argument("stage", metavar="STAGE", choices=("pretrain", "finetune"))
    _takes_overrides(train)
    check = command("check", _check, "validate a recipe, alone or against a cluster")
    check.add_argument(
        "--cluster", metavar="FILE", help="against the node types of a `ray up` file or KubeRay manifest"
    )
    check.add_argument("--address", metavar="URL", help="against the cluster there, as it is and as it may grow")
    _takes_recipe(check)
    submit = command("submit", _submit, "run a recipe or sweep as a job of a cluster, and follow it")
    submit.add_argument("--detach", action="store_true", help="do not follow it")
    _takes_address(submit, "the cluster's job server")
    _takes_recipe(submit)
    stop = command("stop", _stop, "stop the job of a recipe or sweep; it can go on later")
    _takes_address(stop, "the cluster's job server")
    _takes_recipe(stop)
    status = command("status", _status, "how far runs are, by what is in storage")
    status.add_argument("recipe", metavar="RECIPE.yaml", nargs="?", help="of its artifacts alone")
    _takes_overrides(status)
    laptop = command("laptop", _laptop, "start or stop an autoscaling cluster on this machine")
    laptop.add_argument("what", choices=("up", "down"))
    laptop.add_argument("--cluster", metavar="FILE", default="cluster/laptop.yaml", help="(%(default)s)")
    spot = command("watch-spot", _watch_spot, "drain this node once the cloud says that it goes (AWS, Google Cloud)")
    spot.add_argument("--address", metavar="HOST:PORT", required=True, help="of the cluster's GCS")
    spot.add_argument("--node-id", metavar="HEX", help="(that of this machine's address)")
    show = command("show", _show, "print what made an artifact")
    show.add_argument("artifact", metavar="PATH")
    inspect = command("inspect", _inspect, "show what went into a prepared corpus, as figures and as a page")
    inspect.add_argument("artifact", metavar="PATH")
    inspect.add_argument("--samples", type=int, default=24, metavar="N", help="samples on the page (%(default)s)")
    inspect.add_argument("--html", metavar="FILE", help="where the page goes (inspect-FINGERPRINT.html)")
    _takes_evaluation(command("evaluate", _evaluate, "have a model answer a benchmark, and score it"))
    _takes_answers(command("score", _score, "score anybody's file of answers to a benchmark"))
    compare = command("compare", _compare, "two or more evaluations side by side, and where they part")
    compare.add_argument("evaluations", metavar="PATH", nargs="+", help="evaluate artifacts, of one benchmark or more")
    compare.add_argument("--html", metavar="FILE", default="compare.html", help="where the page goes (%(default)s)")
    laboratory = command("laboratory", _laboratory, "make the demo's corpus and backbones in a folder")
    laboratory.add_argument("folder", metavar="FOLDER")
    replay = command("replay", _replay, "compute each sample of a step that was not finite alone")
    replay.add_argument("folder", metavar="FOLDER", help="the replay-step folder that a stopped run names")
    chat = command("chat", _chat, "ask a model a question about a picture")
    chat.add_argument("model", metavar="MODEL", help="a finetune artifact or any Hugging Face folder of a LLaVA")
    chat.add_argument("--image", metavar="FILE")
    chat.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    chat.add_argument("question")
    return parser


def _takes_evaluation(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("model", metavar="MODEL", help="a finetune artifact, a Hugging Face folder, or a hub id")
    evaluate.add_argument("--benchmark", metavar="NAME", required=True, help="as for score")
    evaluate.add_argument("--data", metavar="DIR", required=True, help="the official files; for own, the questions")
    evaluate.add_argument("--images", metavar="DIR", default="", help="where the pictures are, if not below --data")
    evaluate.add_argument("--rule", metavar="RULE", default="exact_match", help="for own, as for score")
    evaluate.add_argument("--protocol", metavar="NAME", default="", help="as for score")
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="the first N questions alone")
    evaluate.add_argument("--max-new-tokens", type=_positive, metavar="N", help="(16; mm-vet 512)")
    evaluate.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="(%(default)s)")
    evaluate.add_argument("--judge", metavar="COMMAND", default="", help="for mm-vet: reads a prompt, prints a grade")
    evaluate.add_argument("--engine", metavar="NAME", default="transformers", help="or vllm, where it is installed")
    evaluate.add_argument("--precision", metavar="NAME", default="auto", help="fp32, bf16, fp16 (as the model is kept)")
    evaluate.add_argument("--workers", type=_positive, metavar="N", help="copies of the model (all there is room for)")
    evaluate.add_argument("--gpus-per-worker", type=int, default=0, metavar="G", help="(%(default)s)")


def _takes_answers(score: argparse.ArgumentParser) -> None:
    score.add_argument("benchmark", metavar="NAME", help="pope, gqa, vqav2, mme, mmvp, scienceqa, mm-vet or own")
    score.add_argument("--answers", metavar="FILE", help="JSONL of question_id and text, or an official result file")
    score.add_argument(
        "--data", metavar="DIR", required=True, help="the official files; for own, the file of questions"
    )
    score.add_argument(
        "--rule", metavar="RULE", default="exact_match", help="for own: exact_match, vqa_accuracy, yes_no"
    )
    score.add_argument("--protocol", metavar="NAME", default="", help="where toolkits differ (pope: llava, lmms-eval)")
    score.add_argument("--grades", metavar="FILE", help="for mm-vet: the judge's reply file")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)


def _takes_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    _takes_overrides(parser)


def _takes_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, such as finetune.lr=1e-5"
    )


def _takes_address(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--address", metavar="URL", help=f"{about} (RAY_API_SERVER_ADDRESS)")


def _address(arguments: argparse.Namespace) -> str | None:
    return arguments.address or os.environ.get("RAY_API_SERVER_ADDRESS")


def _demo(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.demo import demo

    return Outcome(demo(arguments.storage, arguments.overrides, console))


def _run_recipe(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.recipe_file import load_recipe
    from raylava.report import closing, summary
    from raylava.stages import run
    from raylava.storage import writable

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    artifacts = run(recipe, writable(arguments.storage), console, arguments.only)
    closing(artifacts, console)
    return Outcome(summary(artifacts))


def _train(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.recipe_file import load_recipe
    from raylava.stages import train_alone
    from raylava.storage import writable

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    artifact = train_alone(recipe, writable(arguments.storage), arguments.stage, console)
    return Outcome(artifact.record if artifact else {})


def _sweep(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.errors import RunError
    from raylava.storage import writable
    from raylava.tune.findings import Findings
    from raylava.tune.plan import plan, plan_of
    from raylava.tune.report import write_report
    from raylava.tune.runner import SweepRun
    from raylava.tune.sweep import load_sweep
    from raylava.tune.table import plan_table, results_table

    sweep, storage = load_sweep(arguments.sweep), writable(arguments.storage)
    run = SweepRun(sweep, arguments.overrides, storage)
    expected = plan(run.expected(), storage)
    console.show(plan_table(expected))
    if arguments.plan:
        return Outcome({"works": [vars(work) for work in expected.works]})
    ended = run.run(console)
    findings = Findings(sweep, arguments.overrides, plan_of(ended, storage), ended)
    write_report(findings, run.folder)
    console.show(results_table(findings))
    console.say(f"report: [bold]{escape(str(run.folder / 'report.html'))}[/]   (report.md and results.csv beside it)")
    failed = [one for one in ended if one.how == "failed"]
    if failed:
        raise RunError(f"{len(failed)} of {len(ended)} trials failed, the first: {failed[0].failure}")
    return Outcome({"results": findings.table(), "folder": run.folder.uri})


def _check(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.model.backbones import check_known
    from raylava.recipe_file import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_known(recipe.model.language, recipe.model.vision)
    if arguments.address and arguments.cluster:
        raise UserError("check takes --cluster FILE or --address URL; leave one out")
    if arguments.address not in (None, "auto"):
        return _check_there(arguments, recipe, console)
    if arguments.address or arguments.cluster:
        return _check_cluster(arguments, recipe, console)
    return Outcome(recipe.model_dump(mode="json"), f"{arguments.recipe}: good")


def _check_cluster(arguments: argparse.Namespace, recipe: "Recipe", console: Console) -> Outcome:
    """Against a file, or as a driver of the cluster."""
    from dataclasses import asdict

    from raylava.cluster.needs import needs, provisions
    from raylava.cluster.nodes import NodeType, described, live, startable
    from raylava.cluster.roles import has_roles
    from raylava.report import needs_table
    from raylava.session import ray_session

    types: list[NodeType] | None
    if arguments.cluster:
        types, there, roles = described(Path(arguments.cluster)), [], True
    else:
        with ray_session(recipe.resources):
            types, there, roles = startable(), live(), has_roles()
    found = provisions(needs(recipe, roles), there, types)
    console.show(needs_table(recipe, found, arguments.storage))
    never = [one for one in found if one.is_impossible]
    if never:
        stages = " and ".join(never[0].need.stages)
        raise UserError(f"{stages} can never start there: {never[0].need.told}: {never[0].reason}")
    told = "the cluster can run it" if types is not None else "what the autoscaler may start is not known there"
    return Outcome({"provisions": [asdict(one) for one in found]}, f"{arguments.recipe}: {told}")


def _check_there(arguments: argparse.Namespace, recipe: "Recipe", console: Console) -> Outcome:
    """The same question, put by a job: only a driver sees the cluster's nodes and the autoscaler's file."""
    from raylava.cluster.jobs import Jobs, Work
    from raylava.stages import absolute

    command = ("check", "recipe.yaml", "--address", "auto", "--storage", arguments.storage)
    work = Work(recipe.name, command, {"recipe.yaml": absolute(recipe).model_dump(mode="json")})
    told = Jobs(arguments.address).ask(work)
    console.stream.write(told)
    return Outcome({"told": told})


def _submit(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.cluster.jobs import Jobs, work_of

    work = work_of(arguments.recipe, arguments.overrides, arguments.storage)
    jobs = Jobs(_address(arguments))
    submission, is_new = jobs.submit(work)
    console.say(f"job [bold]{submission}[/] " + ("submitted" if is_new else "runs already; following it"))
    if not arguments.detach:
        try:
            jobs.follow(submission, console.stream)
        except KeyboardInterrupt:
            console.say(f"{submission} goes on: submit again to follow it, `raylava stop` to stop it")
            raise
    told = f"next:  raylava status --storage {arguments.storage}"
    return Outcome({"submission_id": submission, "new": is_new}, told)


def _stop(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.cluster.jobs import Jobs, work_of

    work = work_of(arguments.recipe, arguments.overrides, arguments.storage)
    stopped = Jobs(_address(arguments)).stop(work)
    told = f"{stopped}: stopped; submit again to go on from the last checkpoint" if stopped else "no such job runs"
    return Outcome({"submission_id": stopped}, told)


def _status(arguments: argparse.Namespace, console: Console) -> Outcome:
    from dataclasses import asdict

    from raylava.recipe_file import load_recipe
    from raylava.report import status_table
    from raylava.stages import stages_of
    from raylava.status import standings
    from raylava.storage import place

    storage, wanted = place(arguments.storage), None
    if arguments.recipe:
        stages = stages_of(load_recipe(arguments.recipe, arguments.overrides), storage)
        wanted = {stage.draft.fingerprint for stage in stages}
    found = standings(storage, wanted)
    if found:
        console.show(status_table(found))
    return Outcome({"artifacts": [asdict(one) for one in found]}, None if found else f"{storage}: nothing there yet")


def _laptop(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.cluster.laptop import VARIABLES, down, up

    if arguments.what == "down":
        console.say("stopped" if down() else "no laptop cluster runs")
        return Outcome({}, f"unset {' '.join(VARIABLES)}")
    environment = up(Path(arguments.cluster)).environment()
    console.say('a cluster that grows when there is work; `eval "$(raylava laptop up)"` tells this shell of it')
    return Outcome(environment, "\n".join(f"export {name}={value}" for name, value in environment.items()))


def _watch_spot(arguments: argparse.Namespace, console: Console) -> Outcome:
    from functools import partial

    from raylava.cluster.spot import drain_node, find_provider, watch

    notice = watch(find_provider(), partial(drain_node, arguments.address, arguments.node_id))
    return Outcome(vars(notice), f"drained: {notice.reason}")


def _show(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.artifacts import load

    record = load(arguments.artifact).record
    return Outcome(record, json.dumps(record, indent=2, ensure_ascii=False))


def _inspect(arguments: argparse.Namespace, console: Console) -> Outcome:
    from transformers import AutoTokenizer

    from raylava.artifacts import load
    from raylava.corpus.blocks import TOKENIZER
    from raylava.corpus.inspect import inspect, page
    from raylava.report import corpus_table

    artifact = load(arguments.artifact)
    if artifact.stage != "prepare":
        raise UserError(f"{arguments.artifact}: an artifact of {artifact.stage}; inspect shows those of prepare")
    found = inspect(artifact.place, arguments.samples, seed=0)
    tokenizer = AutoTokenizer.from_pretrained((artifact.place / TOKENIZER).local_copy())
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

    from raylava.report import replay_table
    from raylava.storage import place
    from raylava.train.replay import replay

    found = list(replay(place(arguments.folder)))
    console.show(replay_table(found))
    bad = [one.sample_id for one in found if not one.finite]
    told = f"{len(bad)} of {len(found)} samples are not finite alone" + (f": {', '.join(bad[:5])}" if bad else "")
    return Outcome({"samples": [asdict(one) for one in found]}, told)


def _evaluate(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.cluster.roles import TRAIN, labels_for
    from raylava.evaluate.answer import Actors
    from raylava.evaluate.scoring import exam_named
    from raylava.evaluations import evaluate_model
    from raylava.recipe import Resources
    from raylava.report import result_table, tell_unjudged
    from raylava.storage import writable

    given = arguments
    benchmark, exam = exam_named(
        given.benchmark, given.data, given.images, given.rule, given.protocol, given.limit, given.max_new_tokens,
        given.batch_size,
    )  # fmt: skip
    actors = Actors(given.workers, gpus=given.gpus_per_worker, labels=labels_for(TRAIN, Resources()))
    storage = writable(given.storage)
    artifact = evaluate_model(
        given.model, benchmark, exam, storage, actors, given.judge, given.engine, given.precision, console
    )
    if "figures" in artifact.metrics:
        console.show(result_table(artifact.metrics))
    else:
        tell_unjudged(artifact, console)
    return Outcome(artifact.record)


def _score(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.evaluate.scoring import score_file
    from raylava.report import result_table

    if arguments.answers is None and arguments.grades is None:
        raise UserError("score wants the answers; give --answers FILE (for mm-vet --grades FILE)")
    given = (arguments.answers or "", arguments.rule, arguments.protocol, arguments.grades)
    result = score_file(arguments.benchmark, arguments.data, *given)
    metrics = result.metrics()
    console.show(result_table(metrics))
    if result.missing:
        console.say(f"[yellow]without an answer[/], counted as wrong: {escape(', '.join(result.missing[:10]))}")
    return Outcome(metrics | {"missing": list(result.missing)})


def _compare(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.artifacts import load
    from raylava.evaluate.compare import compare
    from raylava.evaluate.compare_page import page
    from raylava.report import comparison_table

    found = compare([load(path) for path in arguments.evaluations])
    Path(arguments.html).write_text(page(found), encoding="utf-8")
    for one in found:
        console.show(comparison_table(one))
    console.say(f"page: [bold]{escape(arguments.html)}[/]   (the questions where they part, with their pictures)")
    return Outcome(
        {
            one.benchmark: {"credit": one.credit, "differences": [vars(each) for each in one.differences]}
            for one in found
        }
    )


def _laboratory(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.demo import make_laboratory

    made = make_laboratory(arguments.storage, console)
    folder = Path(arguments.folder)
    if folder.is_symlink() and folder.resolve().parent.name == made.stage:
        folder.unlink()  # this laboratory's or an earlier one's
    elif folder.exists():
        raise UserError(f"{folder}: is there already and is no laboratory; name a new folder")
    folder.symlink_to(made.place.local_copy(), target_is_directory=True)
    return Outcome(
        {"laboratory": str(made.place)}, f"{folder}: corpus and backbones; next: raylava run jobs/recipes/micro.yaml"
    )


def _chat(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.evaluate.answer import chat_once

    said = chat_once(arguments.model, arguments.image, arguments.question, arguments.max_new_tokens)
    return Outcome({"question": arguments.question, "answer": said}, said)


if __name__ == "__main__":
    sys.exit(main())
