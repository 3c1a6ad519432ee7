"""The Python API: what the commands of the same names do, for notebooks and programs.

Its names are importable from `raylava` itself, which imports a module of this package at the first use of a name.

- `runs`: `run` and `evaluate`, with their results
- `sweeps`: `sweep`, with its results
- `models`: `load_model`, a trained model that answers questions about images
- `corpora`: `open_blocks`, a prepared corpus as a sequence of samples; `make_toy_assets`
"""

DEFAULT_STORAGE = "raylava-storage"  # of the API and of the commands
