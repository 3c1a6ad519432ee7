"""Typed configuration of a sweep file: a base recipe, axes along which it varies, settings to search."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from raylava.config.load import describe_error, read_mapping
from raylava.config.recipe import MAX_SEED, NAME_PATTERN, ConfigModel
from raylava.config.shipped import locate
from raylava.errors import UserError

_RESULT_COLUMNS = (
    "seed",
    "loss",
    "final_loss",
    "outcome",
    "failure",
    "device_hours",
    "shared_device_hours",
    "cost",
    "shared_cost",
    "model_path",
)

Level = dict[str, Any]  # settings by recipe key


def _validate_levels(axis: Any) -> dict[str, Level]:
    for name, settings in axis.items():
        if not isinstance(settings, dict) or not settings:
            raise ValueError(f"level {name!r} must give recipe keys and values, such as {{finetune.lr: 1e-4}}")
        for key in settings:
            if not isinstance(key, str):
                raise ValueError(f"level {name!r} has the key {key!r}, which is no recipe key such as finetune.lr")
    return dict(axis)


class SearchRange(ConfigModel):
    """Values that a search may give to a setting: exactly one of the four fields.

    Both ends of a range are included; `choice` lists plain values.
    """

    loguniform: tuple[float, float] | None = None
    uniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = Field(None, alias="int")
    choice: tuple[bool | int | float | str, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _validate_range(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("give one of loguniform, uniform, int, choice, such as {loguniform: [1.0e-6, 1.0e-4]}")
        ends = self.loguniform or self.uniform or self.integer
        if ends and ends[0] >= ends[1]:
            raise ValueError(f"the lower end {ends[0]} must be below the upper end {ends[1]}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform must start above 0, not at {self.loguniform[0]}; uniform may start there")
        return self

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Return both ends of the range, or all choices."""
        return self.choice or self.loguniform or self.uniform or self.integer or ()


class EarlyStoppingConfig(ConfigModel):
    """Early stopping by finetuning loss, by a scheduler of Ray Tune.

    A trial is first compared after the fraction `grace` of finetuning. With `asha` (Li et al. 2020) it is compared
    again each time after `reduction` times as much, and continues only if its loss is among the best 1/`reduction` of
    the trials that reached the same point. With `hyperband` (its asynchronous form) trials are spread over `brackets`,
    each of which first compares them `reduction` times later than the one before. With `median` (Golovin et al. 2017)
    it is compared ten times, and stops if its best loss is worse than the median of the mean losses so far of at least
    `min_samples` other trials.
    """

    algorithm: Literal["asha", "hyperband", "median"] = "asha"
    grace: float = Field(0.1, ge=0.1, le=1)
    reduction: int = Field(3, ge=2)
    brackets: int = Field(3, ge=1, le=3)
    min_samples: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _settings_belong_to_the_algorithm(self) -> Self:
        used = {"asha": ("reduction",), "hyperband": ("reduction", "brackets"), "median": ("min_samples",)}
        for key in sorted(self.model_fields_set - {"algorithm", "grace", *used[self.algorithm]}):
            raise ValueError(f"{key} does not apply to algorithm={self.algorithm}; remove it")
        return self


class SearchConfig(ConfigModel):
    """A search of settings within each variant, run by Optuna.

    `space` maps recipe keys to ranges. `objective` maps objectives to a direction: `loss` (at the end of finetuning), a
    benchmark's name (its score), `seconds` (training time). `trials` limits the trials of each variant, `hours` the
    time of the whole search, and `max_cost` the price of its training in the currency of `--prices`. `study_storage` is
    an SQLAlchemy URL in which `$NAME` is replaced by the environment variable of the driver; without it, the study is
    stored next to the report.
    """

    space: dict[str, SearchRange] = Field(min_length=1)
    objective: dict[str, Literal["min", "max"]] = Field(min_length=1)
    sampler: Literal["tpe", "random"] = "tpe"
    early_stopping: EarlyStoppingConfig | None = None
    trials: int | None = Field(None, ge=1)
    hours: float | None = Field(None, gt=0)
    max_cost: float | None = Field(None, gt=0)
    study: str | None = Field(None, pattern=NAME_PATTERN)
    study_storage: str | None = None
    seed: int = Field(0, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _validate_budget(self) -> Self:
        if self.trials is None and self.hours is None and self.max_cost is None:
            raise ValueError(
                "a search needs a budget; give trials (of each variant), or hours or max_cost (of the whole search)"
            )
        if self.early_stopping and len(self.objective) > 1:
            raise ValueError("early_stopping supports one objective; keep one objective, or remove early_stopping")
        return self


class SweepConfig(ConfigModel):
    """A sweep: every combination of one level of each axis and one seed is a variant of the recipe.

    `axes` maps each axis to its levels by name; a level sets recipe keys. `exclude` lists combinations to skip, each a
    mapping of axes to levels; an axis that it does not name matches any level. `set` changes the recipe of all
    variants. `seeds` are repetitions. With `search`, each variant becomes a study of many trials.
    """

    name: str = Field(pattern=NAME_PATTERN)
    recipe: str
    set: Level = Field(default={})
    axes: dict[str, Annotated[dict[str, Any], AfterValidator(_validate_levels)]] = Field(default={})
    exclude: tuple[dict[str, str], ...] = ()
    seeds: tuple[Annotated[int, Field(ge=0, le=MAX_SEED)], ...] = ()
    search: SearchConfig | None = None
    max_concurrent_trials: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _validate_names(self) -> Self:
        for axis in self.axes:
            if axis in _RESULT_COLUMNS:
                raise ValueError(f"axis {axis!r} has the name of a column of results.csv; rename the axis")
        for combination in self.exclude:
            for axis, level in combination.items():
                if axis not in self.axes:
                    raise ValueError(f"exclude names an unknown axis {axis!r}; choose one of: {', '.join(self.axes)}")
                if level not in self.axes[axis]:
                    levels = ", ".join(self.axes[axis])
                    raise ValueError(f"exclude names an unknown level {axis}={level}; choose one of: {levels}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} must differ; remove the repeated ones")
        return self


def load_sweep(path: str) -> SweepConfig:
    """Load a sweep from a YAML file, or the shipped one of that name.

    Its `recipe` is a path relative to that file, or the name of a shipped recipe.

    Raises UserError with a one-line message for a missing file, YAML that does not parse, or an invalid key or value.
    """
    file = locate(path)
    data = read_mapping(file, "sweep")
    try:
        sweep = SweepConfig.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {describe_error(error, SweepConfig)}") from error
    return sweep.model_copy(update={"recipe": str(locate(sweep.recipe, file.parent))})
