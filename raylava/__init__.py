"""raylava: train, evaluate and ablate LLaVA-Gemma on Ray.

A recipe (`config`) expands into stages (`pipeline`), each of which produces one fingerprinted artifact (artifacts.py)
on any storage (storage.py). `corpus` prepares conversations and images as Arrow blocks, `models` builds and exports
LLaVA, `train` trains it with DeepSpeed, `evaluate` scores it, `perf` predicts the memory and time of a step,
`estimate` those of a recipe, `tune` runs sweeps, `cluster` connects to Ray, `toy` builds small assets for a laptop,
`cli` is the command line.
"""

__version__ = "0.1.0"
