"""The chat template for llama.cpp's server, and a Modelfile for Ollama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lora_llava.core.errors import UserError
from lora_llava.publishing.gguf.gguf_vocabulary import GgufVocabulary

_TYPED_CONTENT = (
    "{#- Written by lora_llava: llama.cpp's server writes an image as a marker into the text; make it a part again. -#}"
    "{%- set image = namespace(text='<image>') -%}{%- set typed = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string and '<__media' not in message['content'] -%}"
    "{%- set typed.messages = typed.messages + [message] -%}"
    "{%- else -%}"
    "{%- set found = namespace(parts=[]) -%}"
    "{%- if message['content'] is string -%}"
    "{%- set image.text = '<__media' + message['content'].split('<__media')[1].split('__>')[0] + '__>' -%}"
    "{%- for text in message['content'].split(image.text) -%}"
    "{%- if not loop.first -%}{%- set found.parts = found.parts + [{'type': 'image'}] -%}{%- endif -%}"
    "{%- if text -%}{%- set found.parts = found.parts + [{'type': 'text', 'text': text}] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'media_marker' -%}"
    "{%- set image.text = part['text'] -%}{%- set found.parts = found.parts + [{'type': 'image'}] -%}"
    "{%- else -%}{%- set found.parts = found.parts + [part] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- set typed.messages = typed.messages + [{'role': message['role'], 'content': found.parts}] -%}"
    "{%- endif -%}{%- endfor -%}{%- set messages = typed.messages -%}"
)
"""Older versions name an image `<__media__>`, newer ones `<__media_RANDOM__>` (tools/server/server-common.cpp)."""


def read_template(folder: Path) -> str:
    """Return a folder's chat template.

    Raises:
        UserError: If it has none.
    """
    file = folder / "chat_template.jinja"
    if not file.is_file():
        raise UserError(f"{file} is missing; restore it, since llama.cpp's server needs the template that was trained")
    return file.read_text(encoding="utf-8")


def template_for_llama(template: str, vocabulary: GgufVocabulary, bos: str | None) -> str:
    """Return a template with which llama.cpp's server writes the prompts used in training.

    The server writes an image as a marker into the text, without the line break between image and text that the
    exported template adds, splits the prompt at the markers, and tokenises the pieces apart.

    Args:
        template: The exported template, which writes `<image>`.
        vocabulary: The vocabulary.
        bos: The text of BOS.
    """
    text = _TYPED_CONTENT + template.replace("'<image>'", "image.text").replace('"<image>"', "image.text")
    if vocabulary.leading_space and not (bos and _render(template, bos).startswith(bos)):
        text = "{{ ' ' }}" + text
    return text


def _render(template: str, bos: str | None, **options: Any) -> str:
    messages = options.pop("messages", [{"role": "user", "content": "question"}])
    texts, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, bos_token=bos or "", **options
    )
    return str(texts[0])


def modelfile(template: str, bos: str | None, files: tuple[str, str], stops: list[str]) -> str:
    """Return the text of an Ollama Modelfile for one question; it is not tested with Ollama.

    Args:
        template: The exported chat template.
        bos: The text of BOS, which Ollama adds itself.
        files: Names of the files of the language model and of the mmproj.
        stops: Texts at which an answer stops.
    """
    question = {"role": "user", "content": "QUESTION_OF_USER"}
    plain = _render(template, bos, messages=[question])
    try:
        framed = _render(template, bos, messages=[{"role": "system", "content": "SYSTEM_PROMPT"}, question])
    except TemplateError:  # a template without system messages, such as Mistral's
        framed = plain
    text = framed if "SYSTEM_PROMPT" in framed else plain
    head, _, tail = text.removeprefix(bos or "").partition("QUESTION_OF_USER")
    own_system = plain.removeprefix(bos or "").partition("QUESTION_OF_USER")[0]
    if "SYSTEM_PROMPT" in head:
        filled = head.replace("SYSTEM_PROMPT", "{{ .System }}")
        head = f"{{{{ if .System }}}}{filled}{{{{ else }}}}{own_system}{{{{ end }}}}"
    lines = [
        "# Written by lora_llava. UNTESTED: Ollama was not run; llama.cpp's server was.",
        "# ollama create my-llava -f Modelfile",
        f"FROM ./{files[0]}",
        f"FROM ./{files[1]}",
        f'TEMPLATE """{head}{{{{ .Prompt }}}}{tail}{{{{ .Response }}}}"""',
        "PARAMETER temperature 0",
        *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
    ]
    return "\n".join(lines) + "\n"
