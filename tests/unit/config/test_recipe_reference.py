"""docs/recipe.md is generated from the config models and agrees with them."""

import re
import runpy
from pathlib import Path

from raylava.config.recipe import Training

DOCS = Path(__file__).parents[3] / "docs"
GENERATOR = runpy.run_path(str(DOCS / "generate_recipe_reference.py"))


def test_recipe_reference_is_up_to_date():
    is_current = (DOCS / "recipe.md").read_text(encoding="utf-8") == GENERATOR["generate"]()
    assert is_current, f"docs/recipe.md is stale; run `{GENERATOR['COMMAND']}`"


def test_fingerprint_column_agrees_with_the_fingerprint_fields():
    section = GENERATOR["generate"]().split("\n## `pretrain`, `finetune`\n")[1].split("\n## ")[0]
    columns = re.findall(r"^\| `(\w+)` .* \| (yes|no) \|$", section, re.MULTILINE)
    assert {key for key, _ in columns} == set(Training.model_fields)
    assert {key for key, fingerprinted in columns if fingerprinted == "yes"} == set(Training().fingerprint_fields())
