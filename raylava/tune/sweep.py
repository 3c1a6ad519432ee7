"""The sweep's file: a base recipe, axes along which it varies, settings to search. Knows nothing of what that costs."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from raylava.config.load import explained, read_mapping
from raylava.config.recipe import ConfigModel
from raylava.errors import UserError

_COLUMNS = ("seed", "loss", "final_loss", "ended", "failure", "cost_hours", "share_hours", "model_path")

Level = dict[str, Any]  # settings by recipe key


def _levels(axis: Any) -> dict[str, Level]:
    for name, settings in axis.items():
        if not isinstance(settings, dict) or not settings:
            raise ValueError(f"level {name!r} must give recipe keys and values, such as {{finetune.lr: 1e-4}}")
    return dict(axis)


class Range(ConfigModel):
    """Where a setting is searched; one of the four. Both ends of a range count; `choice` takes plain values."""

    loguniform: tuple[float, float] | None = None
    uniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = Field(None, alias="int")
    choice: tuple[bool | int | float | str, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("give one of loguniform, uniform, int, choice, such as {loguniform: [1.0e-6, 1.0e-4]}")
        ends = self.loguniform or self.uniform or self.integer
        if ends and ends[0] >= ends[1]:
            raise ValueError(f"the first end {ends[0]} must be below the second {ends[1]}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform starts above 0, not at {self.loguniform[0]}; uniform may start there")
        return self

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Both ends, or all choices."""
        return self.choice or self.loguniform or self.uniform or self.integer or ()


class Asha(ConfigModel):
    """Asynchronous successive halving (Li et al. 2020): which trials are stopped early, by their finetuning loss.

    After a share `grace` of finetuning, and each time after `reduction` times as much, a trial goes on only when its
    loss is among the best 1/`reduction` of those that came as far.
    """

    grace: float = Field(0.1, ge=0.1, le=1)
    reduction: int = Field(3, ge=2)


class Search(ConfigModel):
    """Settings to search within each variant, by Optuna, until so many trials or hours are spent on each or on all.

    `space` maps recipe keys to ranges. `objective` maps what counts to a direction: `loss` (the end of finetuning), a
    benchmark's name (its score), `seconds` (what the trial's training took). With `study_storage`, an SQLAlchemy URL
    whose `$NAME`s are environment variables, Optuna keeps the study in that database; else it lies beside the report.
    """

    space: dict[str, Range] = Field(min_length=1)
    objective: dict[str, Literal["min", "max"]] = Field(min_length=1)
    sampler: Literal["tpe", "random"] = "tpe"
    asha: Asha | None = None
    trials: int | None = Field(None, ge=1)
    hours: float | None = Field(None, gt=0)
    study: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$")
    study_storage: str | None = None
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.trials is None and self.hours is None:
            raise ValueError("a search needs an end; give trials (of each variant) or hours (of the whole search)")
        if self.asha and len(self.objective) > 1:
            raise ValueError("asha weighs trials by one objective; give one, or leave asha out")
        return self


class Sweep(ConfigModel):
    """Every combination of one level of each axis, and of each seed, is a variant of the recipe.

    An axis is levels by name, each of which sets recipe keys. `exclude` names combinations to leave out (a mapping of
    axes to levels; those it does not name may be any). `set` changes the recipe for all. `seeds` are repetitions.
    With `search`, each variant is a study of many trials.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    recipe: str
    set: Level = Field(default={})
    axes: dict[str, Annotated[dict[str, Any], AfterValidator(_levels)]] = Field(default={})
    exclude: tuple[dict[str, str], ...] = ()
    seeds: tuple[int, ...] = ()
    search: Search | None = None
    max_concurrent_trials: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _names_what_there_is(self) -> Self:
        for axis in self.axes:
            if axis in _COLUMNS:
                raise ValueError(f"an axis cannot be called {axis!r}: results.csv has a column of that name; rename it")
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
