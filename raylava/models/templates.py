"""Chat templates as data: the pieces of a conversation's text, and the same thing as a Jinja template for Hugging Face.

Pure. How pieces become token ids is corpus/conversation.py's business; which family uses which is backbones.py's.
"""

from dataclasses import dataclass

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Template:
    """How one language family writes a conversation. `*_open` and `turn_close` pair a control token with plain text.

    One exchange is: open, user_header, human text, close, gap, open, model_header, answer, close, gap.
    Supervised are each answer, the close token and the gap after it (LLaVA-Gemma; Hinck et al. 2024).
    """

    begin: str  # control token before everything
    open: str  # control token that opens a turn
    close: str  # control token that ends a turn; generation stops on it
    user_header: str
    model_header: str
    gap: str  # plain text after a close token

    def human_text(self, text: str, images: int) -> str:
        """A human turn's text: its images first, one a line, then the words (LLaVA's order)."""
        return f"{IMAGE_TOKEN}\n" * images + text.replace(IMAGE_TOKEN, "").strip()

    def jinja(self) -> str:
        """The chat template for `processor.apply_chat_template`: string content, or a list of text and image parts."""
        return _JINJA.format(
            begin=_quoted(self.begin),
            open=_quoted(self.open),
            close=_quoted(self.close),
            gap=_quoted(self.gap),
            user=_quoted(self.user_header),
            model=_quoted(self.model_header),
            image=_quoted(IMAGE_TOKEN + "\n"),
        )


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


_JINJA = (
    "{{{{ {begin} }}}}"
    "{{% for message in messages %}}"
    "{{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}}"
    "{{{{ raise_exception('turns must alternate: user, assistant, user, …') }}}}"
    "{{% endif %}}"
    "{{{{ {open} }}}}{{% if message['role'] == 'user' %}}{{{{ {user} }}}}{{% else %}}{{{{ {model} }}}}{{% endif %}}"
    "{{% if message['content'] is string %}}{{{{ message['content'] | trim }}}}"
    "{{% else %}}"
    "{{% for part in message['content'] if part['type'] == 'image' %}}{{{{ {image} }}}}{{% endfor %}}"
    "{{% for part in message['content'] if part['type'] == 'text' %}}{{{{ part['text'] | trim }}}}{{% endfor %}}"
    "{{% endif %}}"
    "{{{{ {close} }}}}{{{{ {gap} }}}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ {open} }}}}{{{{ {model} }}}}{{% endif %}}"
)

GEMMA = Template(
    begin="<bos>",
    open="<start_of_turn>",
    close="<end_of_turn>",
    user_header="user\n",
    model_header="model\n",
    gap="\n",
)
