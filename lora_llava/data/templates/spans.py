"""The text of a conversation under a template, in spans that are trained or not."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lora_llava.data.conversation import IMAGE_PLACEHOLDER, EncodingError, Turn
from lora_llava.data.templates.chat_template import ChatTemplate
from lora_llava.data.templates.named_templates import Template, after_images
from lora_llava.data.tokens import own_tokens, plain_backend
from lora_llava.data.typed import as_typed

AnyTemplate = Template | ChatTemplate
"""A template of `TEMPLATES`, or a language model's own."""


class Span(NamedTuple):
    """A part of the conversation's text, and whether it is trained."""

    text: str
    trained: bool


def fit_template(template: AnyTemplate, tokenizer: PreTrainedTokenizerBase) -> AnyTemplate:
    """Remove a template's `after_image` if the tokenizer has no dummy prefix, whose effect it has.

    Args:
        template: A template.
        tokenizer: A fast tokenizer that knows `<image>`.

    Returns:
        The template for this tokenizer.
    """
    if isinstance(template, ChatTemplate) or not template.after_image:
        return template
    backend = plain_backend(tokenizer)
    alone = backend.encode("a", add_special_tokens=False).tokens
    behind = backend.encode(f"{IMAGE_PLACEHOLDER}a", add_special_tokens=False).tokens[1:]
    has_prefix = alone[0].startswith("▁") and not behind[0].startswith("▁")  # SentencePiece's space
    return template if has_prefix else replace(template, after_image="")


def conversation_spans(
    turns: Sequence[Turn], template: AnyTemplate, special_tokens: Collection[str] = ()
) -> list[Span]:
    """Write turns as spans; answers are trained with their stop.

    Args:
        turns: System first if at all, then user and assistant in turn, the assistant last.
        template: The template.
        special_tokens: The tokenizer's special tokens; in a turn's text they are marked as ordinary text, except
            images' places.

    Returns:
        Spans whose joined texts are the conversation without its BOS.

    Raises:
        EncodingError: If turns are out of order, an answer is empty, or the template does not support the conversation.
    """
    if isinstance(template, ChatTemplate):
        return _chat_spans(turns, template, special_tokens)
    typed = [token for token in special_tokens if token != IMAGE_PLACEHOLDER]
    system = as_typed(template.system, special_tokens)
    if turns and turns[0].role == "system":
        system, turns = as_typed(turns[0].text, special_tokens), turns[1:]
    _check_turns(turns, template)
    wrapped = template.system_format.format(system) if system else ""
    spans = [Span(("" if template.system_in_user else wrapped) + template.opening, False)]
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            spans.append(Span(template.answer_prefix + as_typed(turn.text, special_tokens) + template.stop, True))
            spans.append(Span(template.after_answer, False))
            continue
        if template.user_format is None:
            spans.append(Span(IMAGE_PLACEHOLDER * turn.text.count(IMAGE_PLACEHOLDER), False))
            continue
        before, after = template.user_format.split("{}")
        inside = wrapped if template.system_in_user and index == 0 else ""
        question = after_images(as_typed(turn.text, typed), template)
        spans.append(Span(before + inside + question + after, False))
    spans.append(Span(template.closing, False))
    return [span for span in spans if span.text]


def _chat_spans(turns: Sequence[Turn], template: ChatTemplate, special_tokens: Collection[str]) -> list[Span]:
    """Write turns as spans of a model's own template."""
    _check_turns(turns[1:] if turns and turns[0].role == "system" else turns, template)
    typed = [token for token in special_tokens if token != IMAGE_PLACEHOLDER]
    marked = [
        {"role": turn.role, "content": as_typed(turn.text, typed if turn.role == "user" else special_tokens)}
        for turn in turns
    ]
    return [Span(text, trained) for text, trained in template.pieces(marked) if text]


def _check_turns(turns: Sequence[Turn], template: AnyTemplate) -> None:
    if not turns or turns[-1].role != "assistant":
        raise EncodingError("the conversation does not end with an answer; add one")
    for index, turn in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            raise EncodingError(f"turn {index} is the {turn.role}'s; it should be the {expected}'s")
        if turn.role == "assistant" and not turn.text.strip():
            raise EncodingError(f"turn {index}: the answer is empty")
        if turn.role == "assistant" and IMAGE_PLACEHOLDER in turn.text:
            raise EncodingError(f"turn {index}: the answer holds {IMAGE_PLACEHOLDER}; images belong in questions")
    if template.single_turn and (len(turns) != 2 or turns[0].text.count(IMAGE_PLACEHOLDER) != 1):
        raise EncodingError(f"template {template.name} needs one image and one caption; use another template")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, template: AnyTemplate) -> None:
    """Check that a tokenizer can encode for a template.

    Raises:
        EncodingError: If it cannot; the message names what it lacks.
    """
    if not tokenizer.is_fast:
        raise EncodingError(f"{type(tokenizer).__name__} has no offsets; load the fast tokenizer")
    if tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER) in (None, tokenizer.unk_token_id):
        raise EncodingError(f"the tokenizer does not know {IMAGE_PLACEHOLDER}; add it as a special token")
    if isinstance(template, Template):
        _check_tokens(tokenizer, template)
    _check_prompt(tokenizer, template)


def _check_tokens(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    known = own_tokens(tokenizer)
    if template.stop_string is None and template.stop.strip() not in known:
        raise EncodingError(
            f"template {template.name} stops on {template.stop.strip()!r}, the tokenizer on {tokenizer.eos_token!r}; "
            "use a template of this model"
        )
    written = f"{template.system_format}{template.opening}{template.user_format or ''}"
    missing = [token for token in re.findall(r"<\|.+?\|>", written) if token not in known]
    if missing:
        raise EncodingError(
            f"template {template.name} writes {missing[0]}, which the tokenizer does not have; use a template of this "
            "model"
        )


def _check_prompt(tokenizer: PreTrainedTokenizerBase, template: AnyTemplate) -> None:
    """Check that a prompt is split in the same way alone, as when served, and before its answer, as in training."""
    question = IMAGE_PLACEHOLDER if template.single_turn else "What is this?"
    spans = conversation_spans((Turn("user", question), Turn("assistant", "It is a dog.")), template)
    first = next(place for place, span in enumerate(spans) if span.trained)
    prompt, answer = "".join(span.text for span in spans[:first]), spans[first].text
    encode = plain_backend(tokenizer).encode
    alone = encode(prompt, add_special_tokens=False).ids
    if encode(prompt + answer, add_special_tokens=False).ids[: len(alone)] != alone:
        raise EncodingError(
            f"template {template.name} ends a prompt with {prompt[-12:]!r}, which the tokenizer splits differently "
            "before an answer; use a template of this model"
        )
