"""Run a recipe or an evaluation, and read its results. The commands of the same names call these functions."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylava.api import DEFAULT_STORAGE
from raylava.api.corpora import open_blocks
from raylava.artifacts import Artifact
from raylava.cluster.roles import TRAIN, node_labels_for
from raylava.config.load import load_recipe
from raylava.config.recipe import Recipe, Resources
from raylava.console import Console
from raylava.corpus.blocks import Blocks
from raylava.errors import UserError
from raylava.evaluation.endpoint_options import EndpointOptions
from raylava.evaluation.engines import validate_precision
from raylava.evaluation.generation import ActorPool
from raylava.evaluation.loading import load_named_benchmark
from raylava.pipeline import runner
from raylava.pipeline.evaluation import EvaluationRequest, evaluate_model, model_ref
from raylava.pipeline.results import EVALUATE_PREFIX, headline_score, scored_benchmarks, summarize
from raylava.progress import ProgressReporter
from raylava.storage import writable


@dataclass(frozen=True)
class Run:
    """The artifacts of a recipe, by stage label: `prepare instruction`, `pretrain`, `finetune`, `evaluate NAME`."""

    recipe: Recipe
    artifacts: Mapping[str, Artifact]

    @property
    def model(self) -> str:
        """The folder or URI of the trained model, which plain transformers can load. Raises UserError without one."""
        return str(self._artifact("finetune").path)

    @property
    def scores(self) -> dict[str, float]:
        """The headline score of the trained model by benchmark: a fraction, or the benchmark's own points."""
        names = scored_benchmarks(self.artifacts)
        return {name: headline_score(self.artifacts[EVALUATE_PREFIX + name]) for name in names}

    def blocks(self, corpus: str = "instruction") -> Blocks:
        """Return a prepared corpus of the recipe as a sequence of samples. Raises UserError when it was not built."""
        return open_blocks(str(self._artifact(f"prepare {corpus}").path))

    def summary(self) -> dict[str, Any]:
        """Return fingerprint, path and metrics by stage label, as JSON-serializable values (`raylava run --json`)."""
        return summarize(self.artifacts)

    def _artifact(self, label: str) -> Artifact:
        if label not in self.artifacts:
            raise UserError(f"{label}: not a stage of this run; choose one of: {', '.join(self.artifacts)}")
        return self.artifacts[label]


def run(
    recipe: Recipe | str,
    overrides: Sequence[str] = (),
    *,
    storage: str = DEFAULT_STORAGE,
    only: str | None = None,
    reporter: ProgressReporter | None = None,
) -> Run:
    """Build every missing artifact of a recipe, on the cluster of RAY_ADDRESS or on this machine.

    `recipe` is a Recipe, or the file or name of one, to which `overrides` such as `finetune.lr=1e-5` are applied.
    `only="prepare"` stops after the corpora. Progress goes to standard error unless a `reporter` is given.

    Raises UserError for a mistake in the recipe or its data, before anything runs if possible, and RunError when a
    stage fails; a second call resumes it.
    """
    loaded = _load(recipe, overrides)
    artifacts = runner.run(loaded, writable(storage), reporter or Console(sys.stderr), only)
    return Run(loaded, artifacts)


def _load(recipe: Recipe | str, overrides: Sequence[str]) -> Recipe:
    if isinstance(recipe, str):
        return load_recipe(recipe, list(overrides))
    if overrides:
        raise UserError(f"overrides={list(overrides)}: apply to a recipe's file or name; pass them to load_recipe")
    return recipe


def evaluate(
    model: str,
    benchmark: str,
    data: str,
    *,
    images: str = "",
    metric: str = "exact_match",
    protocol: str = "",
    max_rows: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    judge: str = "",
    precision: str = "auto",
    workers: int | None = None,
    gpus_per_worker: int = 0,
    transformers_version: str | None = None,
    blank_images: bool = False,
    endpoints: Sequence[str] = (),
    served_model: str | None = None,
    concurrency: int | None = None,
    start_vllm: bool = False,
    storage: str = DEFAULT_STORAGE,
    reporter: ProgressReporter | None = None,
) -> Artifact:
    """Let a model answer a benchmark, and score it. Returns the evaluation's artifact.

    `model` is a finetune artifact, a Hugging Face folder or a hub id; `benchmark` an official one (vqav2, pope, …) or
    `custom`; `data` the folder of its official files, or the file of custom questions; `images` the folder of the
    images if it is another one. `metrics["scores"]` of the artifact has each metric's value with its 95 % interval,
    `metrics["headline"]` the name of the main one. `workers` is the number of model replicas (default: all that fit).
    `blank_images` replaces every image by the mean color, for a baseline.

    With `endpoints`, the URLs of OpenAI-compatible APIs, running servers answer, and `model` is what they serve, under
    the name `served_model` (default: the only one that they list). Each has up to `concurrency` requests open (default:
    16). `start_vllm` starts vLLM servers on the cluster instead, one for each of `workers` (default: 1), each with
    `gpus_per_worker` GPUs. The environment variable RAYLAVA_ENDPOINT_KEY holds the API key of `endpoints`.

    Raises UserError for a mistake in the arguments or files, RunError when the model cannot be run or no server
    answers; a second call resumes it.
    """
    options = EndpointOptions(tuple(endpoints), served_model, concurrency, start_vllm)
    options.validate(precision, workers, gpus_per_worker)
    validate_precision(precision)
    named, loaded = load_named_benchmark(
        benchmark, data, images, metric, protocol, max_rows, max_new_tokens, batch_size
    )
    node_labels = node_labels_for(TRAIN, Resources())
    reference = model_ref(model, transformers_version)
    request = EvaluationRequest(
        reference,
        named,
        loaded,
        ActorPool(workers, gpus_per_actor=gpus_per_worker, node_labels=node_labels),
        judge=judge,
        blank_images=blank_images,
        precision=precision,
        endpoints=options.find_endpoints(reference.checkpoint),
    )
    return evaluate_model(request, writable(storage), reporter or Console(sys.stderr))
