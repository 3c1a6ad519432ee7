"""Chat templates as data: the parts of a conversation's text, and the equivalent Jinja template for Hugging Face.

corpus/conversation.py tokenizes conversations with these parts; each language family has a template.
"""

from dataclasses import dataclass

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Template:
    """The text format of a conversation in one language family.

    An exchange is: open, user_header, human text, close, gap, open, model_header, answer, close, gap. The loss covers
    each answer, its close token and the gap after it (LLaVA-Gemma; Hinck et al. 2024).
    """

    begin: str  # control token at the start
    open: str  # control token that starts a turn
    close: str  # control token that ends a turn; a stop token of generation
    user_header: str
    model_header: str
    gap: str  # plain text after a close token

    def human_text(self, text: str, images: int) -> str:
        """Return a human turn's text: one image token per line, then the words (LLaVA's order)."""
        return f"{IMAGE_TOKEN}\n" * images + text.replace(IMAGE_TOKEN, "").strip()

    def jinja(self) -> str:
        """Return the template for `apply_chat_template`; content is a string, or a list of text and image parts."""
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
