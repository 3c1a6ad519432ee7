"""Label selectors, and the precedence of the recipe's selectors over the cluster's roles."""

import pytest

from raylava.cluster.roles import ROLE, matches_selector, node_labels_for
from raylava.config.recipe import Resources


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({}, True),
        ({"a": "x"}, True),
        ({"a": "y"}, False),
        ({"b": "x"}, False),
        ({"a": "!y"}, True),
        ({"b": "!x"}, True),
        ({"a": "in(x, y)"}, True),
        ({"a": "!in(x,y)"}, False),
        ({"a": "x", "b": "x"}, False),
    ],
)
def test_selectors_match_labels_as_in_ray(selector: dict[str, str], expected: bool) -> None:
    assert matches_selector({"a": "x"}, selector) is expected


def test_node_labels_of_the_recipe_take_precedence_over_the_clusters_roles() -> None:
    resources = Resources(train_node_labels={"ray.io/accelerator-type": "H100"})
    assert node_labels_for("train", resources, roles=True) == {"ray.io/accelerator-type": "H100"}
    assert node_labels_for("prepare", resources, roles=True) == {ROLE: "prepare"}
