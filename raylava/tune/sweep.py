"""The sweep's file: a base recipe and the axes along which it varies. Knows nothing of what a variant costs or does."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from raylava.errors import UserError
from raylava.recipe import Section
from raylava.recipe_file import explained, read_mapping

Level = dict[str, Any]  # settings by recipe key


def _levels(axis: Any) -> dict[str, Level]:
    for name, settings in axis.items():
        if not isinstance(settings, dict) or not settings:
            raise ValueError(f"level {name!r} must give recipe keys and values, such as {{finetune.lr: 1e-4}}")
    return dict(axis)


class Sweep(Section):
    """Every combination of one level of each axis, and of each seed, is a variant of the recipe.

    An axis is levels by name, each of which sets recipe keys. `exclude` names combinations to leave out (a mapping of
    axes to levels; those it does not name may be any). `set` changes the recipe for all. `seeds` are repetitions.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    recipe: str
    set: Level = Field(default={})
    axes: dict[str, Annotated[dict[str, Any], AfterValidator(_levels)]] = Field(default={})
    exclude: tuple[dict[str, str], ...] = ()
    seeds: tuple[int, ...] = ()
    max_concurrent_trials: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _names_what_there_is(self) -> Self:
        for combination in self.exclude:
            for axis, level in combination.items():
                if axis not in self.axes:
                    raise ValueError(f"exclude names the axis {axis!r}; known here: {', '.join(self.axes)}")
                if level not in self.axes[axis]:
                    raise ValueError(f"exclude names {axis}={level}; its levels are {', '.join(self.axes[axis])}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} must differ")
        return self


def load_sweep(path: str) -> Sweep:
    """The sweep in a YAML file; its `recipe` is looked for beside the file.

    Raises UserError, in one line, for a missing file, YAML that does not parse, or a key or value out of range.
    """
    data = read_mapping(Path(path), "sweep")
    try:
        sweep = Sweep.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {explained(error, Sweep)}") from error
    return sweep.model_copy(update={"recipe": str(Path(path).parent / sweep.recipe)})
