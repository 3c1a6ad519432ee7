"""`raylava evaluate`: have a model answer a benchmark, and score it."""

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import DEFAULT_STORAGE, AsJson, BenchmarkData, Storage, TransformersVersion
from raylava.console import Console


@dataclass(frozen=True)
class _Options:
    """The options of one evaluation, as given."""

    model: str
    benchmark: str
    data: str
    images: str
    metric: str
    protocol: str
    max_rows: int | None
    max_new_tokens: int | None
    batch_size: int
    judge: str
    precision: str
    workers: int | None
    gpus_per_worker: int
    transformers_version: str | None
    blank_images: bool
    endpoints: list[str]
    served_model: str | None
    concurrency: int | None
    start_vllm: bool
    storage: str


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a finetune artifact, Hugging Face folder, or hub id")],
    benchmark: Annotated[str, typer.Option("--benchmark", metavar="NAME", help="as for score")],
    data: BenchmarkData,
    images: Annotated[str, typer.Option("--images", metavar="DIR", help="the images, if not below --data")] = "",
    metric: Annotated[str, typer.Option("--metric", metavar="NAME", help="for custom, as for score")] = "exact_match",
    protocol: Annotated[str, typer.Option("--protocol", metavar="NAME", help="as for score")] = "",
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="the first N questions only")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="(default: the benchmark's own)")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="questions per batch")] = 32,
    judge: Annotated[
        str, typer.Option("--judge", metavar="COMMAND", help="for a judged benchmark: reads a prompt, prints a grade")
    ] = "",
    precision: Annotated[
        str, typer.Option("--precision", metavar="NAME", help="fp32, bf16, fp16, or auto: that of the weights")
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, metavar="N", help="model replicas (default: all that fit)")
    ] = None,
    gpus_per_worker: Annotated[int, typer.Option("--gpus-per-worker", min=0, metavar="G", help="GPUs per replica")] = 0,
    transformers_version: TransformersVersion = None,
    blank_images: Annotated[
        bool, typer.Option("--blank-images", help="replace every image by the mean color, for a baseline")
    ] = False,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--endpoint", metavar="URL", help="let the OpenAI-compatible API there answer; several share the questions"
        ),
    ] = None,
    served_model: Annotated[
        str | None,
        typer.Option("--served-model", metavar="NAME", help="MODEL at the endpoints (default: the only one there)"),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, metavar="N", help="open requests per endpoint (default: 16)")
    ] = None,
    start_vllm: Annotated[
        bool, typer.Option("--start-vllm", help="let vLLM answer, started on the cluster for this evaluation")
    ] = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> int:
    """Have a model answer a benchmark, and score it."""
    options = _Options(
        model, benchmark, data, images, metric, protocol, limit, max_new_tokens, batch_size, judge, precision,
        workers, gpus_per_worker, transformers_version, blank_images, endpoint or [], served_model, concurrency,
        start_vllm, storage,
    )  # fmt: skip
    return execute("evaluate", as_json, lambda console: _evaluate(options, console))


def _evaluate(options: _Options, console: Console) -> CommandResult:
    from raylava.api import runs
    from raylava.cli.tables import result_table
    from raylava.pipeline.report import show_unjudged
    from raylava.pipeline.results import is_scored

    artifact = runs.evaluate(**asdict(options), reporter=console)
    if is_scored(artifact):
        console.show(result_table(artifact.metrics))
    else:
        show_unjudged(artifact, console)
    return CommandResult(artifact.record)
