"""Convert a recipe or sweep file to the specification of a cluster job."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylava.cluster.jobs import JobSpec, is_uri, validate_shared_storage
from raylava.config.load import load_recipe, read_mapping, read_recipe
from raylava.config.recipe import Recipe
from raylava.config.shipped import locate
from raylava.errors import UserError
from raylava.models.hub import is_folder
from raylava.pipeline.graph import make_absolute
from raylava.storage import storage_path

_RECIPE_FILE = "recipe.yaml"
_SWEEP_FILE = "sweep.yaml"


def job_spec_for(file: str, overrides: list[str], storage: str) -> JobSpec:
    """Return the job that does what `raylava run` or `raylava sweep` would do with the file or shipped recipe.

    With local storage, which implies a shared disk, relative paths in the file become absolute. With a bucket they are
    rejected. Raises UserError for them, and for a file that is neither a recipe nor a sweep.
    """
    validate_shared_storage(storage)
    content = read_mapping(locate(file), "recipe or sweep")
    if "recipe" in content:
        return _sweep_job(file, content, overrides, storage)
    recipe = load_recipe(file, overrides)
    if is_uri(storage):
        _reject_local_paths(recipe)
    else:
        recipe = make_absolute(recipe)
    return JobSpec(recipe.name, ("run", _RECIPE_FILE, "--storage", storage), {_RECIPE_FILE: _as_json(recipe)})


def _sweep_job(file: str, content: Mapping[str, Any], overrides: list[str], storage: str) -> JobSpec:
    from raylava.tune.sweep import load_sweep
    from raylava.tune.variants import variants

    sweep = load_sweep(file)
    base_recipe = read_recipe(sweep.recipe)
    files = {_SWEEP_FILE: dict(content) | {"recipe": _RECIPE_FILE}, _RECIPE_FILE: base_recipe}
    recipes = [variant.recipe for variant in variants(sweep, overrides)]
    if is_uri(storage):
        for recipe in recipes:
            _reject_local_paths(recipe)
    else:
        base_recipe["data"] = storage_path(str(base_recipe.get("data") or ".")).uri
        files = {name: _with_absolute_folders(settings) for name, settings in files.items()}
    return JobSpec(sweep.name, ("sweep", _SWEEP_FILE, "--storage", storage, *overrides), files)


def _as_json(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _reject_local_paths(recipe: Recipe) -> None:
    """Raise UserError for a setting that is a path relative to this machine's working directory."""
    model = recipe.model
    settings = {
        "data": recipe.data,
        "model.language.name": model.language.name,
        "model.vision.name": model.vision.name,
        "model.connector.weights": model.connector.weights or "",
    }
    for key, value in settings.items():
        is_path = key in ("data", "model.connector.weights") or is_folder(value)
        if value and is_path and not is_uri(value) and not Path(value).is_absolute():
            raise UserError(
                f"{key}={value}: a local path that the nodes cannot read; use a bucket, such as "
                f"{key}=s3://BUCKET/{value}, or a path that every node mounts"
            )


def _with_absolute_folders(value: Any) -> Any:
    """Return settings with every string that names an existing local folder made absolute.

    Checks all strings, since the keys that hold folders depend on the axes of the sweep.
    """
    if isinstance(value, Mapping):
        return {key: _with_absolute_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_absolute_folders(item) for item in value]
    is_relative = isinstance(value, str) and "/" in value and not is_uri(value) and Path(value).is_dir()
    return storage_path(value).uri if is_relative else value
