"""Conversation templates, once as data for encoding and once as the Jinja text that the exported processor carries.

Each is LLaVA's own (llava/conversation.py): `vicuna_v1` is its `conv_vicuna_v1`, `vicuna_v0` its first format,
`plain` Stage 1's, `llama_2` its `conv_llava_llama_2`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

from lora_llava.core.errors import UserError, nearest

_ASSISTANT = (
    "{listener} and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers"
)
_SYSTEM_V1 = f"A chat between a {_ASSISTANT.format(listener='curious user')} to the user's questions."
_SYSTEM_V0 = f"A chat between a {_ASSISTANT.format(listener='curious human')} to the human's questions."
_SYSTEM_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class Template:
    """How turns become text. A BOS comes before everything and nowhere else.

    Attributes:
        name: The table's key.
        system: The system text where the conversation brings none of its own.
        system_format: Wraps a non-empty system text; `{}` is its place.
        user_format: Wraps a user's text up to where the answer starts; `{}` is its place. None drops the text and
            keeps the images (`plain`).
        opening: Stands between the system text and the first user's turn.
        system_in_user: The wrapped system text goes inside the first user's text.
        answer_prefix: Stands between the prompt and the answer and is trained with it.
        stop: Ends an answer and is trained.
        closing: Follows the last stop, untrained.
        stop_string: What generation stops on where the stop is ordinary text and not the tokenizer's EOS.
        after_image: Follows every image that no other image follows directly. LLaVA splits text at images and
            tokenises the parts one by one (llava/mm_utils.py, tokenizer_image_token), so that SentencePiece puts its
            dummy prefix behind each; one space gives that token in a text that is tokenised as a whole.
    """

    name: str
    system: str
    system_format: str
    user_format: str | None
    stop: str
    opening: str = ""
    system_in_user: bool = False
    answer_prefix: str = " "
    closing: str = ""
    stop_string: str | None = None
    after_image: str = ""

    @property
    def single_turn(self) -> bool:
        return self.user_format is None


TEMPLATES: dict[str, Template] = {
    "vicuna_v1": Template(
        name="vicuna_v1",
        system=_SYSTEM_V1,
        system_format="{} ",
        user_format="USER: {} ASSISTANT:",
        stop="</s>",
        after_image=" ",
    ),
    "vicuna_v0": Template(
        # One "###" both stops an answer and opens the next turn; LLaVA closes the text with "### ".
        name="vicuna_v0",
        system=_SYSTEM_V0,
        system_format="{}\n\n",
        opening="###",
        user_format=" Human: {}\n### Assistant:",
        stop="\n###",
        closing=" ",
        stop_string="###",
        after_image=" ",
    ),
    "plain": Template(
        # The space that opens the answer is what follows the image.
        name="plain",
        system="",
        system_format="",
        user_format=None,
        stop="\n",
        stop_string="\n",
    ),
    "llama_2": Template(
        name="llama_2",
        system=_SYSTEM_LLAMA_2,
        system_format="<<SYS>>\n{}\n<</SYS>>\n\n",
        user_format="[INST] {} [/INST]",
        system_in_user=True,
        stop=" </s>",
        after_image=" ",
    ),
}


def get_template(template: str | Template, system: str | None = None) -> Template:
    """Look a template up by name.

    Args:
        template: A key of `TEMPLATES`, or a template, returned as it is.
        system: Replaces the default system text; "" leaves it out.

    Returns:
        The template.

    Raises:
        UserError: For an unknown name.
    """
    if isinstance(template, str):
        if template not in TEMPLATES:
            raise UserError(
                f"template: {template!r} is unknown{nearest(template, TEMPLATES)}; use one of {', '.join(TEMPLATES)}"
            )
        template = TEMPLATES[template]
    return template if system is None else replace(template, system=system)


_JINJA_TEXT = (
    "{%- macro parts_of(message) -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- set state = namespace(previous='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- if state.previous and 'image' in (part['type'], state.previous) -%}{{ '\\n' }}{%- endif -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- set state.previous = part['type'] -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
)
_JINJA_PLAIN_TEXT = "{%- macro text_of(message) -%}{{ parts_of(message) }}{%- endmacro -%}"
_JINJA_SPACED_TEXT = (
    "{%- macro text_of(message) -%}"
    "{{ parts_of(message).replace('<image>', '<image>' + AFTER).replace('<image>' + AFTER + '<image>', "
    "'<image><image>') }}"
    "{%- endmacro -%}"
)


def stop_strings(template: Template) -> list[str] | None:
    """What a generation config has to name so that stock generation ends an answer of this template."""
    return [template.stop_string] if template.stop_string else None


def after_images(text: str, template: Template) -> str:
    """Put what the template has after an image behind every `<image>` that no other follows directly."""
    return re.sub("<image>(?!<image>)", lambda match: match[0] + template.after_image, text)


def chat_template(template: Template) -> str:
    """The Jinja text with which a stock processor writes the same prompts that were trained.

    It writes no BOS: the exported tokenizer adds the one that there is.

    Args:
        template: The template to write out.

    Returns:
        A chat template for `ProcessorMixin.apply_chat_template`.
    """
    if template.user_format is None:
        user = (
            "{%- set images = text_of(message).split('<image>') | length - 1 -%}"
            "{%- for _ in range(images) -%}{{ '<image>' }}{%- endfor -%}"
        )
    else:
        before, after = template.user_format.split("{}")
        inside = "{{ state.system }}{%- set state.system = '' -%}" if template.system_in_user else ""
        user = f"{_say(before)}{inside}{{{{ text_of(message) }}}}{_say(after)}"
    head, tail = template.system_format.split("{}") if template.system_format else ("", "")
    wrapped = f"{_quote(head)} + state.system + {_quote(tail)}"
    emit = "{{ state.system }}" if template.system_format and not template.system_in_user else ""
    closing = (
        f"{{%- if not add_generation_prompt -%}}{_say(template.closing)}{{%- endif -%}}" if template.closing else ""
    )
    spaced = _JINJA_SPACED_TEXT.replace("AFTER", _quote(template.after_image))
    return (
        f"{_JINJA_TEXT}{spaced if template.after_image else _JINJA_PLAIN_TEXT}"
        f"{{%- set state = namespace(system={_quote(template.system)}) -%}}"
        "{%- if messages and messages[0]['role'] == 'system' -%}"
        "{%- set state.system = text_of(messages[0]) -%}{%- endif -%}"
        f"{{%- if state.system -%}}{{%- set state.system = {wrapped} -%}}{{%- endif -%}}"
        f"{emit}{_say(template.opening)}"
        "{%- for message in messages -%}"
        f"{{%- if message['role'] == 'user' -%}}{user}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{_say(template.answer_prefix)}{{{{ text_of(message) }}}}{_say(template.stop)}"
        "{%- endif -%}{%- endfor -%}"
        f"{closing}"
    )


def _say(text: str) -> str:
    return f"{{{{ {_quote(text)} }}}}" if text else ""


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # escaped, a letter beyond U+FFFF would be two, which Jinja keeps apart
