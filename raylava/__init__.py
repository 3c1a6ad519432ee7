"""raylava: LLaVA-Gemma on Ray, from image-text corpora to a Hugging Face model and its scores.

A recipe (recipe.py) unrolls into stages (stages.py); each stage makes one fingerprinted artifact (artifacts.py) on any
storage (storage.py). The rooms: `corpus` turns conversations and images into Arrow blocks, `model` assembles and
publishes LLaVA, `train` turns blocks into weights, `evaluate` turns a model into scores, and `micro` is a toy_assets in
miniature where all of it runs in minutes on a laptop. `cli` is the door.
"""

__version__ = "0.1.0"
