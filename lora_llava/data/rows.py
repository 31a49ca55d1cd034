"""Encoded rows: what training reads, and the account of what was used and what was dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation
from lora_llava.data.encode import IGNORE_INDEX, Encoded, OverlongError, encode_conversation
from lora_llava.data.images import BadImageError, ImageSource
from lora_llava.data.templates import Template
from lora_llava.errors import UserError

OnOverlong = Literal["error", "drop", "truncate_answer"]
OnBadImage = Literal["error", "drop"]


@dataclass
class Report:
    """What became of a split's rows.

    Attributes:
        rows: Rows read.
        used: Rows kept.
        dropped: Rows left out, by reason.
        truncated: Rows kept with the end of their answer cut.
        tokens: Tokens of the kept rows, image tokens included.
        supervised_tokens: Trained tokens among them.
        longest: Tokens of the longest kept row.
    """

    rows: int = 0
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "dropped": dict(self.dropped)}


def build_rows(
    conversations: Sequence[Conversation],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str | Template,
    num_image_tokens: int,
    max_length: int,
    on_overlong: OnOverlong = "error",
    images: ImageSource | None = None,
    on_bad_image: OnBadImage = "error",
    progress: Callable[[Iterable[Conversation]], Iterable[Conversation]] = lambda rows: rows,
) -> tuple[list[dict[str, Any]], Report]:
    """Encode conversations and account for every one of them.

    Args:
        conversations: The rows.
        tokenizer: See `encode_conversation`.
        template: See `encode_conversation`.
        num_image_tokens: See `encode_conversation`.
        max_length: Most tokens of a row.
        on_overlong: `error` refuses a longer row, `drop` leaves it out, `truncate_answer` cuts its last answer's end,
            and refuses it where that is not enough.
        images: Opened once each, to find bad ones before training; None trusts them.
        on_bad_image: `error` or `drop`.
        progress: Wraps the loop, for a progress bar.

    Returns:
        Rows with `row_id`, `input_ids`, `labels` and `image_files`, and the report.

    Raises:
        UserError: Naming the row, where one is refused; or where no row is left.
    """
    report = Report(rows=len(conversations))
    bad = _bad_images(conversations, images) if images is not None else {}
    rows: list[dict[str, Any]] = []
    for index, conversation in enumerate(progress(conversations)):
        if problem := bad.get(index):
            if on_bad_image == "error":
                raise UserError(f"row {conversation.row_id}: {problem}; mend it or set data.on_bad_image=drop")
            report.dropped["bad image"] += 1
            continue
        _check_placeholders(conversation)
        encoded = _encode(conversation, tokenizer, template, num_image_tokens, max_length, on_overlong, report)
        if encoded is None:
            continue
        report.used += 1
        report.tokens += len(encoded["input_ids"])
        report.longest = max(report.longest, len(encoded["input_ids"]))
        report.supervised_tokens += sum(label != IGNORE_INDEX for label in encoded["labels"])
        rows.append({"row_id": conversation.row_id, **encoded, "image_files": list(conversation.images)})
    if not rows:
        raise UserError(f"no row is left of {report.rows}; dropped: {dict(report.dropped)}")
    return rows, report


def _encode(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: str | Template, num_image_tokens: int,
    max_length: int, on_overlong: OnOverlong, report: Report,
) -> Encoded | None:  # fmt: skip
    messages = [{"role": turn.role, "content": turn.text} for turn in conversation.turns]

    def encode(limit: int | None) -> Encoded:
        return encode_conversation(
            messages, tokenizer=tokenizer, template=template, num_image_tokens=num_image_tokens, max_length=limit
        )

    try:
        encoded = encode(None)
        length = len(encoded["input_ids"])
        if length <= max_length:
            return encoded
        if on_overlong == "error":
            raise OverlongError(
                f"the sample has {length} tokens, over data.max_length {max_length}; raise it, or set "
                "data.on_overlong to drop or truncate_answer"
            )
        if on_overlong == "truncate_answer":
            encoded = encode(max_length)
            report.truncated += 1
            return encoded
        report.dropped["overlong"] += 1
        return None
    except UserError as error:
        raise UserError(f"row {conversation.row_id}: {error}") from None


def _check_placeholders(conversation: Conversation) -> None:
    count = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in conversation.turns)
    if count != len(conversation.images):
        raise UserError(
            f"row {conversation.row_id}: {count} {IMAGE_PLACEHOLDER} placeholders for {len(conversation.images)} "
            "pictures; make them equal"
        )


def _bad_images(conversations: Sequence[Conversation], images: ImageSource) -> dict[int, str]:
    def check(conversation: Conversation) -> str | None:
        try:
            for name in conversation.images:
                images.open(name)
        except BadImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        return {index: problem for index, problem in enumerate(pool.map(check, conversations)) if problem}
