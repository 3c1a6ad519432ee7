"""The Python API: what the commands of the same names do, for notebooks and programs.

Its names are importable from `raylava` itself, which imports this package (and with it Ray) at their first use.

- `runs`: `run`, `evaluate` and `sweep`, with their results
- `models`: `load_model`, a trained model that answers questions about images
- `corpora`: `open_blocks`, a prepared corpus as a sequence of samples; `make_toy_assets`
"""

from raylava.api.corpora import make_toy_assets, open_blocks
from raylava.api.models import Model, load_model
from raylava.api.runs import Run, Sweep, evaluate, run, sweep
from raylava.artifacts import Artifact
from raylava.config.load import load_recipe
from raylava.config.recipe import Recipe
from raylava.corpus.blocks import Blocks, Sample
from raylava.errors import RunError, UserError

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
