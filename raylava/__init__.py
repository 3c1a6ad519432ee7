"""raylava: train, evaluate and ablate LLaVA-Gemma on Ray.

A recipe (`config`) expands into stages (`pipeline`), each of which produces one fingerprinted artifact (artifacts.py)
on any storage (storage.py). `corpus` prepares conversations and images as Arrow blocks, `models` builds and exports
LLaVA, `train` trains it with DeepSpeed, `evaluate` scores it, `perf` predicts the memory and time of a step,
`estimate` those of a recipe, `tune` runs sweeps, `cluster` connects to Ray, `toy` builds small assets for a laptop,
`api` is the Python API, whose names are those of `__all__` here, `cli` the command line.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raylava.api import (
        Artifact,
        Blocks,
        Model,
        Recipe,
        Run,
        RunError,
        Sample,
        Sweep,
        UserError,
        evaluate,
        load_model,
        load_recipe,
        make_toy_assets,
        open_blocks,
        run,
        sweep,
    )

__version__ = "0.1.0"
__all__ = [
    "Artifact",
    "Blocks",
    "Model",
    "Recipe",
    "Run",
    "RunError",
    "Sample",
    "Sweep",
    "UserError",
    "evaluate",
    "load_model",
    "load_recipe",
    "make_toy_assets",
    "open_blocks",
    "run",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Import the API at the first use of one of its names: the command line must start without Ray and torch."""
    if name not in __all__:
        raise AttributeError(f"module 'raylava' has no attribute {name!r}")
    from raylava import api

    globals().update({public: getattr(api, public) for public in __all__})
    return globals()[name]
