"""`raylava chat`: ask a model a question about an image."""

from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import AsJson, TransformersVersion


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a finetune artifact, Hugging Face folder, or hub id")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="the question")],
    image: Annotated[str | None, typer.Option("--image", metavar="FILE", help="the image")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="tokens to generate")
    ] = 128,
    transformers_version: TransformersVersion = None,
    as_json: AsJson = False,
) -> int:
    """Ask a model a question about an image."""
    return execute("chat", as_json, lambda _: _chat(model, transformers_version, question, image, max_new_tokens))


def _chat(
    model: str, transformers_version: str | None, question: str, image: str | None, max_new_tokens: int
) -> CommandResult:
    from raylava.evaluate.generation import chat_once
    from raylava.models.checkpoint import find_checkpoint

    answer = chat_once(find_checkpoint(model, transformers_version), image, question, max_new_tokens)
    return CommandResult({"question": question, "answer": answer}, answer)
