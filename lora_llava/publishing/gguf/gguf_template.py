"""The chat template for llama.cpp's server, and a Modelfile for Ollama."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from lora_llava.core.errors import UserError
from lora_llava.publishing.gguf.gguf_vocabulary import GgufVocabulary

_TYPE = re.compile(r"(?<=[\[( ])((?:part|piece|content|item)\['type'\])")
_FIND_MARKER = (
    "{#- Written by lora_llava: llama.cpp names an image by a marker of its own. -#}"
    "{%- set image = namespace(text='<image>') -%}"
    "{%- for message in messages -%}{%- if message['content'] is not string -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'media_marker' -%}"
    "{%- set image.text = part['text'] -%}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}"
)


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

    The server passes an image as a part of type `media_marker` whose text is a random marker, splits the prompt there, and
    tokenises the pieces apart.

    Args:
        template: The exported template, which writes `<image>`.
        vocabulary: The vocabulary.
        bos: The text of BOS.
    """
    text = template.replace("'<image>'", "image.text").replace('"<image>"', "image.text")
    text = re.sub(r"\b(part|piece)\['type'\]", r"\1['type'].replace('media_marker', 'image')", text)
    if text != template:
        text = _FIND_MARKER + text
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
    framed = _render(template, bos, messages=[{"role": "system", "content": "SYSTEM_PROMPT"}, question])
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
        *(f"PARAMETER stop {stop!r}".replace("'", '"') for stop in stops),
    ]
    return "\n".join(lines) + "\n"
