"""The official benchmarks: one module per benchmark, listed here, and those of other installed packages.

A module's BENCHMARK holds all that raylava knows about it: reading the published files, the prompt, the metric and its
protocols. Labels are joined to questions by key, never by position; a label or question without a partner is an error
that names it. docs/extend.md shows how to add one, here or in a package of your own.
"""

from functools import cache
from importlib.metadata import entry_points

from raylava.evaluation.benchmarks import gqa, mm_vet, mme, mmvp, pope, scienceqa, vqav2
from raylava.evaluation.benchmarks.benchmark import OfficialBenchmark

ENTRY_POINTS = "raylava.benchmarks"  # the group in which a package names its OfficialBenchmark objects
CUSTOM = "custom"  # the name of questions in raylava's own or LLaVA's format
_BENCHMARKS = {module.BENCHMARK.name: module.BENCHMARK for module in (pope, gqa, vqav2, mme, mmvp, scienceqa, mm_vet)}


def register(benchmark: OfficialBenchmark) -> None:
    """Add a benchmark in this process, which is enough: workers receive its questions.

    Raises ValueError when its name is taken.
    """
    if benchmark.name in (*_BENCHMARKS, CUSTOM):
        raise ValueError(f"benchmark {benchmark.name} exists already; choose another name")
    _BENCHMARKS[benchmark.name] = benchmark


def official_benchmarks() -> dict[str, OfficialBenchmark]:
    """Return the official benchmarks by name."""
    _load_plugins()
    return dict(_BENCHMARKS)


@cache
def _load_plugins() -> None:
    for entry_point in entry_points(group=ENTRY_POINTS):
        register(entry_point.load())
