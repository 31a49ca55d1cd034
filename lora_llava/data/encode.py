"""Encode conversations as token ids and labels.

Ids and labels come from one list of spans (text, trained or not): the spans are joined and tokenised once, and a token
is trained if its span is. So a prompt has the same ids in training as from a stock processor, and no text is searched
for or split.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypedDict

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_llava.data.conversation import IMAGE_PLACEHOLDER, EncodingError, Message, Turn, read_turns
from lora_llava.data.templates import Template, after_images, get_template
from lora_llava.data.typed import as_typed, special_tokens, text_backend

IGNORE_INDEX = -100
"""Label of a token that is not trained (torch.nn.CrossEntropyLoss, `ignore_index`)."""


class Encoded(TypedDict):
    """Token ids and labels, two lists of equal length."""

    input_ids: list[int]
    labels: list[int]


class Span(NamedTuple):
    """A part of the conversation's text, and whether it is trained."""

    text: str
    trained: bool


class OverlongError(EncodingError):
    """A sample that would lose an answer, or part of its prompt, to the length limit."""

    kind = "overlong"


def encode_conversation(
    messages: Sequence[Message],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str | Template,
    num_image_tokens: int,
    max_length: int | None = None,
) -> Encoded:
    """Encode a conversation for training: only the assistant's tokens and the stop after each answer are trained.

    Example:
        >>> encode_conversation(
        ...     [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", "content": "A dog."}],
        ...     tokenizer=tokenizer, template="vicuna_v1", num_image_tokens=576,
        ... )  # doctest: +SKIP

    Args:
        messages: `{"role", "content"}` messages, the content a string with `<image>` for an image or a list of text
            and image parts; or LLaVA's `{"from", "value"}`. System first if at all, then user and assistant in turn,
            the assistant last. Other special tokens in their texts are encoded as ordinary text.
        tokenizer: A fast tokenizer that knows `<image>`.
        template: A key of `lora_llava.data.TEMPLATES`, or a template.
        num_image_tokens: Number of `<image>` ids for one image (CLIP ViT-L/14-336: 576).
        max_length: Most tokens of a sample; the end of the last answer is cut to fit. None does not cut.

    Returns:
        `input_ids` and `labels`, two lists of int of equal length; a label is the id itself or -100.

    Raises:
        EncodingError: If turns are out of order, an answer is empty, or no token is trained.
        OverlongError: If `max_length` would cut more than the end of the last answer.
    """
    template = get_template(template)
    check_tokenizer(tokenizer, template)
    template = fit_template(template, tokenizer)
    spans = conversation_spans(read_turns(messages), template, special_tokens(tokenizer))
    compact = encode_spans([spans], tokenizer)[0]
    if isinstance(compact, EncodingError):
        raise compact
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    return expand(*compact, image_id=image_id, num_image_tokens=num_image_tokens, max_length=max_length)


Compact = tuple[np.ndarray, np.ndarray]
"""Ids, int32, with one `<image>` per image, and which of them are trained, bool, both of shape (tokens,)."""


def encode_spans(batch: Sequence[Sequence[Span]], tokenizer: PreTrainedTokenizerBase) -> list[Compact | EncodingError]:
    """Tokenise a batch of conversations, including BOS.

    Args:
        batch: The spans of each conversation, from `conversation_spans`.
        tokenizer: As in `encode_conversation`.

    Returns:
        For each conversation its ids and trained mask, or the error.
    """
    texts = [_unicode("".join(span.text for span in spans)) for spans in batch]
    backend = text_backend(tokenizer, [text or "" for text in texts])
    backend.no_truncation()  # an earlier call of the tokenizer may have enabled them
    backend.no_padding()
    encodings = backend.encode_batch([text or "" for text in texts], add_special_tokens=False)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found: list[Compact | EncodingError] = []
    for spans, text, encoding in zip(batch, texts, encodings, strict=True):
        if text is None:
            found.append(
                EncodingError(
                    "its text has half a surrogate pair, which is not a character; remove it", "malformed text"
                )
            )
            continue
        trained = np.zeros(len(bos) + len(encoding.ids), dtype=bool)
        try:
            for start, end in _trained_ranges(spans, encoding, tokenizer):
                trained[len(bos) + start : len(bos) + end] = True
        except EncodingError as error:
            found.append(error)
            continue
        found.append((np.array(bos + encoding.ids, dtype=np.int32), trained))
    return found


def _unicode(text: str) -> str | None:
    """Return the text; None if it cannot be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text


def _trained_ranges(spans: Sequence[Span], encoding: Any, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Return the token ranges of trained spans: by looking up the spans' starts, or, if a span does not start at a
    token, by checking every token."""
    starts, position = [], 0
    runs = _runs(spans)
    for run in runs:
        token = encoding.char_to_token(position)
        if token is None or (position and encoding.token_to_chars(token)[0] != position):
            trained = _tokenise(spans, tokenizer)[1]
            return [(i, i + 1) for i, is_trained in enumerate(trained) if is_trained]
        starts.append(0 if position == 0 else token)
        position += len(run.text)
    ends = [*starts[1:], len(encoding.ids)]
    return [(start, end) for run, start, end in zip(runs, starts, ends, strict=True) if run.trained]


def _runs(spans: Sequence[Span]) -> list[Span]:
    """Join neighbouring spans that are both trained or both untrained."""
    runs: list[Span] = []
    for span in spans:
        if runs and runs[-1].trained == span.trained:
            runs[-1] = Span(runs[-1].text + span.text, span.trained)
        else:
            runs.append(span)
    return runs


def expand(
    ids: np.ndarray, trained: np.ndarray, *, image_id: int, num_image_tokens: int, max_length: int | None = None
) -> Encoded:
    """Replace each `<image>` by the image's tokens, and cut the end of the last answer to fit.

    Args:
        ids: From `encode_spans`.
        trained: From `encode_spans`.
        image_id: The id of `<image>`.
        num_image_tokens: As in `encode_conversation`.
        max_length: As in `encode_conversation`.

    Returns:
        As `encode_conversation`.

    Raises:
        EncodingError: Where no token is trained.
        OverlongError: If `max_length` would cut more than the end of the last answer.
    """
    is_image = ids == image_id
    repeats = np.where(is_image, num_image_tokens, 1)
    input_ids = np.repeat(ids, repeats)
    labels = np.repeat(np.where(trained & ~is_image, ids, IGNORE_INDEX), repeats)
    if max_length is not None and len(input_ids) > max_length:
        _check_cut(labels, max_length)
        input_ids, labels = input_ids[:max_length], labels[:max_length]
    if (labels == IGNORE_INDEX).all():
        raise EncodingError("the sample has no trained token", "no trained token")
    return {"input_ids": input_ids.tolist(), "labels": labels.tolist()}


def encode_prompt(
    messages: Sequence[Message], *, tokenizer: PreTrainedTokenizerBase, template: str | Template, num_image_tokens: int
) -> list[int]:
    """Encode a conversation that ends with the user, up to where the answer starts.

    Args:
        messages: As in `encode_conversation`, without the last answer.
        tokenizer: As in `encode_conversation`.
        template: As in `encode_conversation`.
        num_image_tokens: As in `encode_conversation`.

    Returns:
        The prompt's ids: those that the same prompt has in training.
    """
    turns = (*read_turns(messages), Turn("assistant", "?"))
    spans = conversation_spans(turns, fit_template(get_template(template), tokenizer), special_tokens(tokenizer))
    prompt = spans[: max(i for i, span in enumerate(spans) if span.trained)]
    ids, _ = _tokenise(prompt, tokenizer)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + [token for i in ids for token in ([i] * num_image_tokens if i == image_id else [i])]


def fit_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Remove a template's `after_image` if the tokenizer has no dummy prefix that it stands for.

    Args:
        template: A template.
        tokenizer: A fast tokenizer that knows `<image>`.

    Returns:
        The template for this tokenizer.
    """
    if not template.after_image:
        return template
    backend = tokenizer.backend_tokenizer
    alone = backend.encode("a", add_special_tokens=False).tokens
    behind = backend.encode(f"{IMAGE_PLACEHOLDER}a", add_special_tokens=False).tokens[1:]
    has_prefix = alone[0].startswith("▁") and not behind[0].startswith("▁")  # SentencePiece's space
    return template if has_prefix else replace(template, after_image="")


def conversation_spans(turns: Sequence[Turn], template: Template, special_tokens: Collection[str] = ()) -> list[Span]:
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


def _check_turns(turns: Sequence[Turn], template: Template) -> None:
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


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Check that a tokenizer can encode for a template.

    Raises:
        EncodingError: If it cannot; the message names what it lacks.
    """
    if not tokenizer.is_fast:
        raise EncodingError(f"{type(tokenizer).__name__} has no offsets; load the fast tokenizer")
    if tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER) in (None, tokenizer.unk_token_id):
        raise EncodingError(f"the tokenizer does not know {IMAGE_PLACEHOLDER}; add it as a special token")
    if template.stop_string is None and template.stop.strip() != tokenizer.eos_token:
        raise EncodingError(
            f"template {template.name} stops on {template.stop.strip()!r}, the tokenizer on {tokenizer.eos_token!r}; "
            "use a template of this model"
        )


def _tokenise(spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Tokenise the joined spans at once; a token belongs to the span that holds its first character."""
    text = "".join(span.text for span in spans)
    encoding = text_backend(tokenizer, [text]).encode(text, add_special_tokens=False)
    trained: list[bool] = []
    ends = []
    position = 0
    for span in spans:
        position += len(span.text)
        ends.append(position)
    index = 0
    for start, end in encoding.offsets:
        while index < len(ends) - 1 and start >= ends[index]:
            index += 1
        if end > ends[index] and spans[index].trained != spans[min(index + 1, len(spans) - 1)].trained:
            around = text[max(0, start - 10) : end + 10]
            raise EncodingError(
                f"one token covers the border between prompt and answer in {around!r}; separate them by a space"
            )
        trained.append(spans[index].trained)
    return encoding.ids, trained


def last_answer_start(labels: np.ndarray) -> int:
    """Return the start of the last answer in labels of shape (tokens,); 0 if nothing is trained."""
    trained = np.flatnonzero(labels != IGNORE_INDEX)
    if not len(trained):
        return 0
    gaps = np.flatnonzero(np.diff(trained) > 1)
    return int(trained[gaps[-1] + 1] if len(gaps) else trained[0])


def _check_cut(labels: np.ndarray, max_length: int) -> None:
    last_answer = last_answer_start(labels)
    if last_answer >= max_length:
        raise OverlongError(
            f"the sample has {len(labels)} tokens and its last answer starts at token {last_answer}: "
            f"a limit of {max_length} would cut the answer away"
        )
