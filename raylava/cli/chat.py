"""`raylava chat`: ask a model a question about an image."""

from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import AsJson


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a finetune artifact or any Hugging Face LLaVA folder")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="the question")],
    image: Annotated[str | None, typer.Option("--image", metavar="FILE", help="the image")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="tokens to generate")
    ] = 128,
    as_json: AsJson = False,
) -> int:
    """Ask a model a question about an image."""
    return execute("chat", as_json, lambda console: _chat(model, question, image, max_new_tokens))


def _chat(model: str, question: str, image: str | None, max_new_tokens: int) -> CommandResult:
    from raylava.evaluate.generation import chat_once

    answer = chat_once(model, image, question, max_new_tokens)
    return CommandResult({"question": question, "answer": answer}, answer)
