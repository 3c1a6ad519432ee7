"""Arguments, options and help texts that several commands share."""

import inspect
import os
from typing import Annotated

import typer

from raylava.api import DEFAULT_STORAGE as DEFAULT_STORAGE

RecipeFile = Annotated[
    str, typer.Argument(metavar="RECIPE", help="a recipe file, or a name that `raylava recipes` lists")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="settings to change, such as finetune.lr=1e-5")
]
Storage = Annotated[str, typer.Option("--storage", metavar="URI", help="where artifacts are stored")]
TransformersVersion = Annotated[
    str | None,
    typer.Option(
        "--transformers-version",
        metavar="VERSION",
        help="the version that saved the model, if its config.json is wrong about it",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output")]
BenchmarkData = Annotated[
    str, typer.Option("--data", metavar="DIR", help="the official files; for custom, the questions")
]
Address = Annotated[
    str | None, typer.Option("--address", metavar="URL", help="the cluster's job server (RAY_API_SERVER_ADDRESS)")
]


def help_text(description: str, *examples: str) -> str:
    """Return the help of a command: its docstring, and a block of example lines, which typer would not indent."""
    title = "Example:" if len(examples) == 1 else "Examples:"
    return "\n".join([inspect.cleandoc(description), "", title, *examples])


def job_server(address: str | None) -> str | None:
    """Return the address of the job server from the option or the environment."""
    return address or os.environ.get("RAY_API_SERVER_ADDRESS")
