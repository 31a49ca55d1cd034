"""A language model's own chat template: how its Jinja text trains, and how it is saved to be served.

The text is rendered for each conversation, so that whatever it does, such as trimming or a default system text, happens
in training as it does when the model is served. A prompt is the text rendered up to an answer; the answer ends at the
template's stop token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from lora_llava.core.errors import UserError
from lora_llava.core.json_files import read_object_if_any
from lora_llava.data.conversation import IMAGE_PLACEHOLDER, EncodingError

if TYPE_CHECKING:  # the recipe imports the templates' names, and should not load these
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
"""The value of `data.template` that takes the model's own template."""
_MARK = "{#- Written by lora_llava: lists of text and images become text. -#}"
"""Starts a template that has the preamble already."""
_TEXTS = (
    "{%- set plain = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set plain.messages = plain.messages + [message] -%}"
    "{%- else -%}"
    "{%- set part = namespace(text='', previous='') -%}"
    "{%- for piece in message['content'] -%}"
    "{%- if part.previous and 'image' in (piece['type'], part.previous) -%}"
    "{%- set part.text = part.text + '\\n' -%}{%- endif -%}"
    "{%- set part.text = part.text + ('<image>' if piece['type'] == 'image' else piece['text']) -%}"
    "{%- set part.previous = piece['type'] -%}"
    "{%- endfor -%}"
    "{%- set plain.messages = plain.messages + [{'role': message['role'], 'content': part.text}] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = plain.messages -%}"
)
"""Turns lists of parts into text, an image on a line of its own, as in `named_templates`."""
_LISTS = (
    "{%- set listed = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set listed.messages = listed.messages + "
    "[{'role': message['role'], 'content': [{'type': 'text', 'text': message['content']}]}] -%}"
    "{%- else -%}"
    "{%- set listed.messages = listed.messages + [message] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = listed.messages -%}"
)
"""Turns texts into lists of one part, for the templates of vision-language models, which read only lists."""
_SYSTEM = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{%- set messages = [{'role': 'system', 'content': SYSTEM}] + messages -%}"
    "{%- endif -%}"
)
_SYSTEM_PART = _SYSTEM.replace("SYSTEM", "[{'type': 'text', 'text': SYSTEM}]")
_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""Fixes the date of templates that insert today's, at the one that Llama 3.1's names where it is not given: a prompt
of next year is then the one that was trained."""
_NO_THINKING = "{%- set enable_thinking = false -%}"
"""Asks for answers without a thinking block: the trained answers have none."""
_QUESTION, _ANSWER = "What is this?", "It is a dog."


@dataclass(frozen=True)
class ChatTemplate:
    """A language model's own chat template.

    Attributes:
        text: The Jinja text with the preamble: the one that is rendered in training and saved with the model.
        variables: What the text may name besides messages: the tokenizer's special tokens.
        stop: The token that ends an answer and is trained.
        listed: Whether the text reads contents as lists of parts, as those of vision-language models do.
    """

    text: str
    variables: tuple[tuple[str, str], ...]
    stop: str
    listed: bool = False

    name = AUTO
    title = "the model's own chat template"
    single_turn = False
    stop_string = None

    def render(self, messages: Sequence[Mapping[str, str]], prompt: bool) -> str:
        """Render messages, with the start of an answer if `prompt`.

        Raises:
            EncodingError: If the template refuses them, such as a system text where it has no place for one.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            written, _ = render_jinja_template(
                conversations=[[_with_parts(message) for message in messages] if self.listed else list(messages)],
                chat_template=self.text,
                add_generation_prompt=prompt,
                **dict(self.variables),
            )
        except (TemplateError, TypeError) as error:
            raise EncodingError(f"the model's chat template refuses it: {error}", "refused by the template") from None
        return str(written[0])

    def pieces(self, messages: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, bool]]:
        """Split the rendered conversation into pieces of text that are trained or not.

        Args:
            messages: `{"role", "content"}`, each content a text; the assistant last.

        Yields:
            The text of a piece, and whether it is trained: an answer with the stop token that ends it.

        Raises:
            EncodingError: If an earlier part is written differently once more follows, or an answer is changed.
        """
        whole, position = self.render(messages, False), 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:index], True)
            if not whole.startswith(prompt) or len(prompt) < position:
                raise EncodingError(
                    f"the model's chat template writes what comes before answer {index} differently once an answer "
                    "follows; name a data.template, such as chatml",
                    "rewritten by the template",
                )
            end = whole.find(self.stop, len(prompt))
            answer = whole[len(prompt) : end]
            if end < 0 or message["content"].strip() not in answer:
                raise EncodingError(
                    f"the model's chat template changes or drops answer {index}; name a data.template, such as chatml",
                    "rewritten by the template",
                )
            yield whole[position : len(prompt)], False
            position = end + len(self.stop)
            yield whole[len(prompt) : position], True
        yield whole[position:], False


def own_template(tokenizer: PreTrainedTokenizerBase, text: str, system: str | None = None) -> ChatTemplate:
    """Return a model's own chat template, ready to train and to be saved.

    A template that writes earlier turns differently once more turns follow, such as Qwen3's, which drops their thinking
    blocks, is replaced by the one that TRL has for training that model.

    Args:
        tokenizer: The model's tokenizer.
        text: The Jinja text of the model's template.
        system: The recipe's system text; None keeps the template's own.

    Returns:
        The template.

    Raises:
        UserError: If answers have no stop token, or no version of the text writes a conversation turn by turn.
    """
    variables = tuple((name, str(token)) for name, token in sorted(tokenizer.special_tokens_map.items()))
    problems: list[str] = []
    for candidate in filter(None, (text, _training_texts().get(text))):
        for listed in (False, True):
            whole = candidate if candidate.startswith(_MARK) else _preamble(candidate, system, listed) + candidate
            try:
                template = ChatTemplate(whole, variables, "", listed)
                template = replace(template, stop=_stop_of(template, tokenizer))
                _check(template, system)
                return template
            except EncodingError as error:
                problems.append(str(error))
    problem = max(problems, key=lambda problem: "ends an answer" in problem)
    if system is not None and (without := _or_none(tokenizer, text)) is not None:
        if not system:  # the template has no place for a system text: nothing to leave out
            return without
        raise UserError(
            f"data.system_prompt is set, but {problem.partition('; name a')[0]}; leave data.system_prompt out, or "
            "name a data.template"
        )
    fix = "" if "name a data.template" in problem else "; name a data.template, such as chatml"
    raise UserError(f"data.template is auto, but {problem}{fix}")


def _or_none(tokenizer: PreTrainedTokenizerBase, text: str) -> ChatTemplate | None:
    try:
        return own_template(tokenizer, text)
    except UserError:
        return None


def _with_parts(message: Mapping[str, str]) -> dict[str, Any]:
    """Return a message with its content as a list of images and texts; line breaks at an image go."""
    pieces = message["content"].split(IMAGE_PLACEHOLDER)
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(pieces):
        text = piece.strip("\n") if len(pieces) > 1 else piece
        parts += [{"type": "image"}] * (index > 0) + [{"type": "text", "text": text}] * bool(text)
    return {"role": message["role"], "content": parts}


def _preamble(text: str, system: str | None, listed: bool) -> str:
    parts = [_MARK, _LISTS if listed else _TEXTS]
    if system is not None:
        parts.append((_SYSTEM_PART if listed else _SYSTEM).replace("SYSTEM", json.dumps(system, ensure_ascii=False)))
    if "strftime_now" in text:
        parts.append(_DATE)
    if "enable_thinking" in text:
        parts.append(_NO_THINKING)
    return "".join(parts)


@cache
def _training_texts() -> dict[str, str]:
    """Return TRL's templates for training, by the text of the template that each replaces."""
    spec = find_spec("trl")
    folders = [Path(place) / "chat_templates" for place in (spec.submodule_search_locations or [])] if spec else []
    return {
        original.read_text(encoding="utf-8"): training.read_text(encoding="utf-8")
        for folder in folders
        for training in sorted(folder.glob("*_training.jinja"))
        if (original := training.with_name(training.name.replace("_training", ""))).is_file()
    }


def _stop_of(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that follows an answer."""
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    whole = template.render(messages, False)
    if _ANSWER not in whole:
        raise EncodingError("the model's chat template changes or drops answers; name a data.template, such as chatml")
    behind = whole.rpartition(_ANSWER)[2]
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    found = [token for token in tokens if token and behind.strip().startswith(token)]
    if not found:
        raise EncodingError(
            f"the model's chat template ends an answer with {behind!r}, which is not a token of its vocabulary: "
            "answers would not end; name a data.template, such as vicuna_v1"
        )
    return max(found, key=len)


def _check(template: ChatTemplate, system: str | None) -> None:
    """Check that conversations of one and of three turns are the sum of their parts."""
    turn = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    starts = [[]] if system is None else [[], [{"role": "system", "content": system}]]
    for start in starts:
        for count in (1, 3):
            trained = [text for text, is_trained in template.pieces([*start, *turn * count]) if is_trained]
            if len(set(trained)) != 1:
                raise EncodingError(
                    f"the model's chat template writes the same answer in {len(set(trained))} ways; name a "
                    "data.template, such as chatml",
                    "rewritten by the template",
                )


def saved_text(folder: Path) -> str | None:
    """Return the chat template in a model's folder; None if it has none.

    Args:
        folder: Folder of a language model, a LLaVA or a run.

    Returns:
        Its Jinja text, from the first of these: chat_template.jinja, chat_template.json, processor_config.json,
        tokenizer_config.json (transformers, processing_utils.py and tokenization_utils_base.py).
    """
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = read_object_if_any(folder / name).get("chat_template")
        if isinstance(found, list):  # several templates by name
            found = next((each["template"] for each in found if each.get("name") == "default"), None)
        if found:
            return str(found)
    return None
