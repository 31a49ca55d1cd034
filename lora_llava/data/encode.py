"""Encode conversations as token ids and labels.

Ids and labels come from one list of spans (text, trained or not): the spans are joined and tokenised once, and a token
is trained if its span is. So a prompt has the same ids in training as from a stock processor, and no text is searched
for or split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_llava.data.conversation import IMAGE_PLACEHOLDER, EncodingError, Message, Turn, read_turns
from lora_llava.data.templates.named_templates import get_template
from lora_llava.data.templates.spans import AnyTemplate, Span, check_tokenizer, conversation_spans, fit_template
from lora_llava.data.tokens import leading_ids
from lora_llava.data.typed import special_tokens, text_backend

IGNORE_INDEX = -100
"""Label of a token that is not trained (torch.nn.CrossEntropyLoss, `ignore_index`)."""


class Encoded(TypedDict):
    """Token ids and labels, two lists of equal length."""

    input_ids: list[int]
    labels: list[int]


class OverlongError(EncodingError):
    """A sample that would lose an answer, or part of its prompt, to the length limit."""

    kind = "overlong"


def encode_conversation(
    messages: Sequence[Message],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str | AnyTemplate,
    num_image_tokens: int | Sequence[int],
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
        num_image_tokens: Number of `<image>` ids for one image (CLIP ViT-L/14-336: 576), or for each image in order.
        max_length: Most tokens of a sample; the end of the last answer is cut to fit. None does not cut.

    Returns:
        `input_ids` and `labels`, two lists of int of equal length; a label is the id itself or -100.

    Raises:
        EncodingError: If turns are out of order, an answer is empty, or no token is trained.
        OverlongError: If `max_length` would cut more than the end of the last answer.
    """
    template = get_template(template) if isinstance(template, str) else template
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
    encodings = backend.encode_batch([text or "" for text in texts], add_special_tokens=False)
    leading = leading_ids(tokenizer)
    found: list[Compact | EncodingError] = []
    for spans, text, encoding in zip(batch, texts, encodings, strict=True):
        if text is None:
            found.append(
                EncodingError(
                    "its text has half a surrogate pair, which is not a character; remove it", "malformed text"
                )
            )
            continue
        bos = [] if _has_bos(text, tokenizer) else leading
        trained = np.zeros(len(bos) + len(encoding.ids), dtype=bool)
        try:
            for start, end in _trained_ranges(spans, encoding, tokenizer):
                trained[len(bos) + start : len(bos) + end] = True
        except EncodingError as error:
            found.append(error)
            continue
        found.append((np.array(bos + encoding.ids, dtype=np.int32), trained))
    return found


def _has_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Check whether a template has written BOS itself; processors then add none (transformers/processing_utils.py)."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


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
    ids: np.ndarray,
    trained: np.ndarray,
    *,
    image_id: int | None,
    num_image_tokens: int | Sequence[int] | np.ndarray,
    max_length: int | None = None,
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
    repeats = np.ones(len(ids), dtype=np.int64)
    repeats[is_image] = num_image_tokens
    input_ids = np.repeat(ids, repeats)
    labels = np.repeat(np.where(trained & ~is_image, ids, IGNORE_INDEX), repeats)
    if max_length is not None and len(input_ids) > max_length:
        _check_cut(labels, max_length)
        input_ids, labels = input_ids[:max_length], labels[:max_length]
    if (labels == IGNORE_INDEX).all():
        raise EncodingError("the sample has no trained token", "no trained token")
    return {"input_ids": input_ids.tolist(), "labels": labels.tolist()}


def repeat_images(ids: Sequence[int], image_id: int | None, num_image_tokens: int | Sequence[int]) -> list[int]:
    """Return ids with each `<image>` repeated; the arguments are those of `expand`."""
    array = np.asarray(ids, dtype=np.int64)
    repeats = np.ones(len(array), dtype=np.int64)
    repeats[array == image_id] = num_image_tokens
    found: list[int] = np.repeat(array, repeats).tolist()
    return found


def encode_prompt(
    messages: Sequence[Message],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str | AnyTemplate,
    num_image_tokens: int | Sequence[int],
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
    chosen = get_template(template) if isinstance(template, str) else template
    spans = conversation_spans(turns, fit_template(chosen, tokenizer), special_tokens(tokenizer))
    prompt = spans[: max(i for i, span in enumerate(spans) if span.trained)]
    ids, _ = _tokenise(prompt, tokenizer)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    bos = [] if _has_bos(prompt[0].text, tokenizer) else leading_ids(tokenizer)
    return bos + repeat_images(ids, image_id, num_image_tokens)


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
                f"one token covers the border between prompt and answer in {around!r}; put a space between them, or "
                "remove the line breaks that the answer starts with"
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
