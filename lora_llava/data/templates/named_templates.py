"""Conversation templates, as data for encoding and as Jinja text for the exported processor.

The first four are LLaVA's (llava/conversation.py): `vicuna_v1` is its `conv_vicuna_v1`, `vicuna_v0` its first format,
`plain` Stage 1's, `llama_2` its `conv_llava_llama_2`; the others are those of newer language models, for bases that
have no chat template of their own.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lora_llava.core.errors import UserError, nearest
from lora_llava.data.templates.chat_template import AUTO, ChatTemplate

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
    """A conversation template. Its text contains no BOS; a tokenizer that adds one puts it in front.

    Attributes:
        name: The key in `TEMPLATES`.
        system: The system text of a conversation without one.
        system_format: Wraps a non-empty system text; `{}` is its place.
        user_format: Wraps a user's text up to where the answer starts; `{}` is its place. None drops the text and
            keeps the images (`plain`).
        opening: Text between the system text and the first user's turn.
        system_in_user: Whether the wrapped system text goes inside the first user's text.
        answer_prefix: Text between the prompt and the answer, trained with the answer.
        stop: Ends an answer and is trained.
        closing: Follows the last stop, untrained.
        stop_string: The text at which generation stops, if the stop is not the tokenizer's EOS.
        after_answer: Follows every stop, untrained.
        after_image: Text after every image that is not directly followed by another image. LLaVA splits text at images
            and tokenises the parts one by one (llava/mm_utils.py, tokenizer_image_token), so that SentencePiece puts
            its dummy prefix after each; in a text that is tokenised at once, a space has the same effect.
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
    after_answer: str = ""

    @property
    def title(self) -> str:
        """Name for a person."""
        return self.name

    @property
    def single_turn(self) -> bool:
        return self.user_format is None


_CHATML = Template(  # openai-python 0.28, chatml.md
    name="chatml",
    system="",
    system_format="<|im_start|>system\n{}<|im_end|>\n",
    user_format="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    answer_prefix="",
    stop="<|im_end|>",
    after_answer="\n",
)
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
        # The space before the answer is the text after the image.
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
    "chatml": _CHATML,
    "qwen": replace(_CHATML, name="qwen", system="You are a helpful assistant."),  # as Qwen2.5's chat template
    "llama_3": Template(  # Meta's model card of Llama 3, "Instruct Model Prompt"
        name="llama_3",
        system="",
        system_format="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        user_format="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer_prefix="",
        stop="<|eot_id|>",
    ),
    "phi_3": Template(  # microsoft/Phi-3-mini-4k-instruct, "Chat Format"
        name="phi_3",
        system="",
        system_format="<|system|>\n{}<|end|>\n",
        user_format="<|user|>\n{}<|end|>\n<|assistant|>\n",
        answer_prefix="",
        stop="<|end|>",
        after_answer="\n",
    ),
    "mistral": Template(  # mistralai/Mistral-7B-Instruct-v0.2, tokenizer_config.json
        name="mistral",
        system="",
        system_format="{}\n\n",
        user_format="[INST] {} [/INST]",
        system_in_user=True,
        stop="</s>",
        after_image=" ",
    ),
}
if TYPE_CHECKING:
    TemplateName = str
else:
    TemplateName = Literal[(AUTO, *TEMPLATES)]
"""`auto`, which is the model's own, or a key of `TEMPLATES`; recipes accept these."""


def get_template(template: str | Template, system: str | None = None) -> Template:
    """Return a template by name.

    Args:
        template: A key of `TEMPLATES`, or a template, which is returned.
        system: Replaces the default system text; "" omits it.

    Returns:
        The template.

    Raises:
        UserError: If the name is unknown.
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


def after_images(text: str, template: Template) -> str:
    """Insert the template's `after_image` after every `<image>` that is not directly followed by another."""
    return re.sub("<image>(?!<image>)", lambda match: match[0] + template.after_image, text)


def chat_template(template: Template | ChatTemplate) -> str:
    """Return the Jinja template with which a stock processor writes the prompts used in training.

    It writes no BOS: the exported tokenizer adds it.

    Args:
        template: The template to convert.

    Returns:
        A chat template for `ProcessorMixin.apply_chat_template`.
    """
    if isinstance(template, ChatTemplate):
        return template.text
    if template.user_format is None:
        user = (
            "{%- set images = text_of(message).split('<image>') | length - 1 -%}"
            "{%- for _ in range(images) -%}{{ '<image>' }}{%- endfor -%}"
        )
    else:
        before, after = template.user_format.split("{}")
        inside = "{{ state.system }}{%- set state.system = '' -%}" if template.system_in_user else ""
        user = f"{_emit(before)}{inside}{{{{ text_of(message) }}}}{_emit(after)}"
    head, tail = template.system_format.split("{}") if template.system_format else ("", "")
    wrapped = f"{_quote(head)} + state.system + {_quote(tail)}"
    emit = "{{ state.system }}" if template.system_format and not template.system_in_user else ""
    closing = (
        f"{{%- if not add_generation_prompt -%}}{_emit(template.closing)}{{%- endif -%}}" if template.closing else ""
    )
    spaced = _JINJA_SPACED_TEXT.replace("AFTER", _quote(template.after_image))
    return (
        f"{_JINJA_TEXT}{spaced if template.after_image else _JINJA_PLAIN_TEXT}"
        f"{{%- set state = namespace(system={_quote(template.system)}) -%}}"
        "{%- if messages and messages[0]['role'] == 'system' -%}"
        "{%- set state.system = text_of(messages[0]) -%}{%- endif -%}"
        f"{{%- if state.system -%}}{{%- set state.system = {wrapped} -%}}{{%- endif -%}}"
        f"{emit}{_emit(template.opening)}"
        "{%- for message in messages -%}"
        f"{{%- if message['role'] == 'user' -%}}{user}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{_emit(template.answer_prefix)}{{{{ text_of(message) }}}}{_emit(template.stop + template.after_answer)}"
        "{%- endif -%}{%- endfor -%}"
        f"{closing}"
    )


def _emit(text: str) -> str:
    return f"{{{{ {_quote(text)} }}}}" if text else ""


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # escaped, a letter beyond U+FFFF would be two characters in Jinja
