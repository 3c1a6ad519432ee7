"""The untrained baseline is exported by a task that a sweep's trial starts, whose placement group holds one byte."""

from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylava.artifacts import Artifact
from raylava.pipeline.graph import build_stages
from raylava.pipeline.stages import UntrainedStage
from raylava.progress import NullProgressBar
from raylava.storage import storage_path
from raylava.toy.demo import toy_recipe


@pytest.mark.usefixtures("ray_cluster")
def test_untrained_model_is_exported_within_a_trial(toy_assets: Artifact, tmp_path: Path) -> None:
    recipe = toy_recipe(toy_assets.path, ["pretrain.enabled=false", "evaluate.0.baselines=[untrained]"])
    (stage,) = (stage for stage in build_stages(recipe, storage_path(tmp_path)) if isinstance(stage, UntrainedStage))
    group = placement_group([{"memory": 1}])
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)  # as Ray Tune's

    @ray.remote(num_cpus=0, scheduling_strategy=strategy)
    def trial() -> None:
        stage.run(NullProgressBar())

    try:
        ray.get(trial.remote())
    finally:
        remove_placement_group(group)
    assert (Path(str(stage.spec().path)) / "model.safetensors").exists()
