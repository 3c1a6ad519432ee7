"""raylava: train, evaluate and ablate LLaVA-Gemma on Ray.

A recipe (`config`) expands into stages (`pipeline`), each of which produces one fingerprinted artifact (artifacts.py)
on any storage (storage.py). `corpus` prepares conversations and images as Arrow blocks, `models` builds and exports
LLaVA, `train` trains it with DeepSpeed, `evaluation` scores it, `perf` predicts the memory and time of a step,
`estimate` those of a recipe, `tune` runs sweeps, `cluster` connects to Ray, `toy` builds small assets for a laptop,
`api` is the Python API, whose names are those of `__all__` here, `cli` the command line.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raylava.api.corpora import make_toy_assets, open_blocks
    from raylava.api.models import Conversation, Model, load_model
    from raylava.api.runs import Run, evaluate, run
    from raylava.api.sweeps import Sweep, sweep
    from raylava.artifacts import Artifact
    from raylava.config.load import load_recipe
    from raylava.config.recipe import Recipe
    from raylava.corpus.blocks import Blocks, Sample
    from raylava.errors import RunError, UserError

__version__ = "0.1.0"
__all__ = [
    "Artifact",
    "Blocks",
    "Conversation",
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
_MODULES = {
    "raylava.api.corpora": ("make_toy_assets", "open_blocks"),
    "raylava.api.models": ("Conversation", "Model", "load_model"),
    "raylava.api.runs": ("Run", "evaluate", "run"),
    "raylava.api.sweeps": ("Sweep", "sweep"),
    "raylava.artifacts": ("Artifact",),
    "raylava.config.load": ("load_recipe",),
    "raylava.config.recipe": ("Recipe",),
    "raylava.corpus.blocks": ("Blocks", "Sample"),
    "raylava.errors": ("RunError", "UserError"),
}


def __getattr__(name: str) -> Any:
    """Import a name of the API at its first use: the command line must start without Ray and torch."""
    for module, names in _MODULES.items():
        if name in names:
            globals()[name] = getattr(importlib.import_module(module), name)
            return globals()[name]
    raise AttributeError(f"module 'raylava' has no attribute {name!r}")
