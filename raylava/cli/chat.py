"""`raylava chat`: ask a model one question about images, or hold a conversation with it."""

import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import AsJson, TransformersVersion
from raylava.console import Console
from raylava.errors import UserError, first_line

if TYPE_CHECKING:
    from PIL import Image

    from raylava.evaluation.chat import ChatSession

_PROMPT = "> "
_HELP = {
    "/image FILE": "add an image to the next question",
    "/new": "start over, without the images",
    "/help": "show these commands",
    "/quit": "end; so does Ctrl-D",
}


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a finetune artifact, Hugging Face folder, or hub id")],
    question: Annotated[
        str | None, typer.Argument(metavar="[QUESTION]", help="the question; without one, chat reads them from stdin")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", metavar="FILE", help="an image; may be given several times")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="tokens to generate")
    ] = 128,
    transformers_version: TransformersVersion = None,
    as_json: AsJson = False,
) -> int:
    """Ask a model a question about images, or hold a conversation with it."""
    return execute(
        "chat",
        as_json,
        lambda console: _chat(model, transformers_version, question, image or [], max_new_tokens, as_json, console),
    )


def _chat(
    model: str,
    transformers_version: str | None,
    question: str | None,
    images: Sequence[str],
    max_new_tokens: int,
    as_json: bool,
    console: Console,
) -> CommandResult:
    from raylava.evaluation.chat import ChatSession, load_chat_engine, open_image
    from raylava.models.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(model, transformers_version)
    opened = [open_image("--image", file) for file in images]
    if question is None and sys.stdin is None:
        raise UserError("no QUESTION, and standard input is closed; give a QUESTION")
    session = ChatSession(load_chat_engine(checkpoint), max_new_tokens)
    if question is not None:
        answer = session.ask(question, opened)
        return CommandResult({"question": question, "answer": answer}, answer)
    conversation = _Conversation(session, list(zip(images, opened, strict=True)), console, as_json)
    if sys.stdin.isatty():
        conversation.run_interactively(sys.stdin)
    else:
        conversation.answer_lines(sys.stdin)
    return CommandResult({"model": model, "conversations": conversation.transcript()})


class _Conversation:
    """Questions and commands from standard input; the answers go to standard output, or with --json to the end."""

    def __init__(
        self, session: "ChatSession", images: "list[tuple[str, Image.Image]]", console: Console, as_json: bool
    ) -> None:
        """`images` has names and pixels for the first question."""
        self._session, self._console, self._as_json = session, console, as_json
        self._images = images
        self._transcript: list[list[dict[str, Any]]] = [[]]

    def transcript(self) -> list[list[dict[str, Any]]]:
        """Return the questions, image files and answers of each conversation; `/new` starts another one."""
        return [exchanges for exchanges in self._transcript if exchanges]

    def run_interactively(self, lines: IO[str]) -> None:
        """Prompt for lines until /quit or the end of the input. Ctrl-C interrupts an answer, or drops a line."""
        self._console.say(f"[dim]images: {len(self._images)}; /help lists the commands[/]")
        while True:
            try:
                self._console.write(_PROMPT)
                line = _read_line(lines)
                if line is None:
                    self._console.write("\n")  # the shell's prompt follows
                    return
                if line == "/quit":
                    return
                self._respond(line, one_line=False)
            except UserError as error:
                self._console.error(first_line(error))
            except KeyboardInterrupt:
                self._console.say("\n[dim]interrupted[/]")

    def answer_lines(self, lines: IO[str]) -> None:
        """Answer one question per line, each in one line. Raises UserError for a mistake, with its line number."""
        number = 0
        while (line := _read_line(lines)) is not None and line != "/quit":
            number += 1
            try:
                self._respond(line, one_line=True)
            except UserError as error:
                raise UserError(f"standard input, line {number}: {first_line(error)}") from error

    def _respond(self, line: str, one_line: bool) -> None:
        """Carry out a command or answer a question; an empty line does nothing."""
        if line.startswith("/"):
            self._execute(*line.split(maxsplit=1))
        elif line:
            answer = self._ask(line)
            self._print_answer(" ".join(answer.splitlines()) if one_line else answer)

    def _execute(self, name: str, argument: str = "") -> None:
        from raylava.evaluation.chat import open_image

        if name == "/image" and argument:
            self._images.append((argument, open_image("/image", argument)))
        elif name == "/new" and not argument:
            self._session.restart()
            self._images.clear()
            self._transcript.append([])
        elif name == "/help" and not argument:
            for usage, purpose in _HELP.items():
                self._console.write(f"{usage:<12} {purpose}\n")
        else:
            raise UserError(f"{name} {argument}".strip() + f": unknown command; choose one of: {', '.join(_HELP)}")

    def _ask(self, question: str) -> str:
        answer = self._session.ask(question, [pixels for _, pixels in self._images])
        files = [file for file, _ in self._images]
        self._transcript[-1].append({"question": question, "images": files, "answer": answer})
        self._images.clear()  # they belong to this turn from now on
        return answer

    def _print_answer(self, answer: str) -> None:
        if not self._as_json:
            self._console.print_result(answer)
        elif sys.stdin.isatty():  # standard output is for the JSON object
            self._console.write(answer + "\n")


def _read_line(lines: IO[str]) -> str | None:
    """Return the next line without surrounding white space, or None at the end of the input."""
    try:
        line = lines.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} text; convert it") from error
    return line.strip() if line else None
