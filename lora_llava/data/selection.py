"""Select the encoded rows that a split uses, and report why the others are not used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation, EncodingError
from lora_llava.data.encode import OverlongError
from lora_llava.data.encoded import EncodedRows, EncodedTable, answer_starts, encode_table
from lora_llava.data.images.image_check import ImageFacts, inspect_images
from lora_llava.data.images.image_id import ImageName, own_names
from lora_llava.data.images.image_names import MATCHED
from lora_llava.data.images.image_sources import ImageSource
from lora_llava.data.images.tiling import TiledImages
from lora_llava.data.images.to_rgb import SCALED, TRANSPARENT
from lora_llava.data.sources import Read, list_source
from lora_llava.data.templates.spans import AnyTemplate

OnOverlong = Literal["error", "drop", "truncate_answer"]
OnBad = Literal["error", "drop"]
BAD_IMAGE, OVERLONG, NOT_DRAWN = "bad image", "overlong", "not drawn"


@dataclass
class Report:
    """Counts of a split's used and dropped rows.

    Attributes:
        rows: Rows read.
        used: Rows kept.
        dropped: Rows dropped, by reason.
        truncated: Rows kept with the end of their answer cut.
        tokens: Tokens of the kept rows, image tokens included.
        supervised_tokens: Trained tokens among them.
        longest: Tokens of the longest kept row.
        repaired: Rows kept after a harmless repair, by the repair.
        sources: Rows used of each source, if there are several.
    """

    rows: int = 0
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    repaired: Counter[str] = field(default_factory=Counter)
    sources: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "dropped": dict(self.dropped), "repaired": dict(self.repaired)}


@dataclass(frozen=True)
class Policy:
    """How to treat rows that cannot be used unchanged.

    Attributes:
        max_length: Most tokens of a row.
        on_overlong: `error` raises on a longer row, `drop` drops it, `truncate_answer` cuts the end of its last answer,
            and raises if that is not enough.
        on_bad_row: `error` or `drop`, for a row that is not a valid conversation.
        on_bad_image: `error` or `drop`, for a row whose image cannot be opened.
    """

    max_length: int
    on_overlong: OnOverlong = "error"
    on_bad_row: OnBad = "error"
    on_bad_image: OnBad = "error"


def select_rows(tables: Sequence[EncodedTable], places: np.ndarray, policy: Policy) -> tuple[EncodedRows, Report]:
    """Select the usable rows of a split, by their text; images are checked by `without_bad_images`.

    Args:
        tables: The tables of the sources, with image tokens.
        places: The table and row of each row, int64 of shape (rows, 2), in order.
        policy: How to treat the other rows.

    Returns:
        The rows, and the report so far; `account` completes it.

    Raises:
        UserError: If a row is refused; the message names the first one.
    """
    report = Report(rows=len(places))
    places = places.reshape(-1, 2)
    kept = np.ones(len(places), dtype=bool)
    for number, table in enumerate(tables):
        mine = np.flatnonzero(places[:, 0] == number)
        good = _sound(table, places[mine, 1], policy.on_bad_row, report)
        good[good] = _fitting(table, places[mine[good], 1], policy, report)
        kept[mine] = good
    return EncodedRows(tables, places[kept], max_length=policy.max_length), report


def _sound(table: EncodedTable, rows: np.ndarray, on_bad_row: OnBad, report: Report) -> np.ndarray:
    """Return the mask of the rows that could be encoded."""
    bad = np.isin(rows, table.problems.where())
    for place in np.flatnonzero(bad):
        problem = table.problem(int(rows[place]))
        assert problem is not None  # the row is among those with a problem
        if on_bad_row == "error":
            more = int(bad.sum()) - 1
            others = f"; {more} more rows cannot be used; `lora-llava check` lists them" if more else ""
            raise EncodingError(f"{table.row_name(int(rows[place]))}: {problem}{others}", problem.kind)
        report.dropped[problem.kind] += 1
    return ~bad


def _fitting(table: EncodedTable, rows: np.ndarray, policy: Policy, report: Report) -> np.ndarray:
    """Return the mask of the rows that are short enough or can be cut."""
    lengths = table.lengths()[rows]
    long = lengths > policy.max_length
    if not long.any():
        return ~long
    first = int(np.flatnonzero(long)[0])
    name = f"{table.row_name(int(rows[first]))}: the sample has {lengths[first]} tokens"
    if policy.on_overlong == "error":
        raise OverlongError(
            f"{name}, over data.max_length {policy.max_length}; raise it, or set data.on_overlong to drop or "
            f"truncate_answer{tiles_advice(table, int(rows[first]), policy.max_length)}"
        )
    if policy.on_overlong == "drop":
        report.dropped[OVERLONG] += int(long.sum())
        return ~long
    starts = answer_starts(table, rows[long])
    gone = np.flatnonzero(starts >= policy.max_length)
    if len(gone):
        place = np.flatnonzero(long)[gone[0]]
        raise OverlongError(
            f"{table.row_name(int(rows[place]))}: the sample has {lengths[place]} tokens and its last answer "
            f"starts at token {starts[gone[0]]}: a limit of {policy.max_length} would cut the answer away; raise "
            "data.max_length, or set data.on_overlong to drop"
            f"{tiles_advice(table, int(rows[place]), policy.max_length)}"
        )
    report.truncated += int(long.sum())
    return np.ones(len(rows), dtype=bool)


def tiles_advice(table: EncodedTable, row: int, max_length: int) -> str:
    """Return the end of a message about a row that is over the limit: whether fewer tiles make it fit.

    Args:
        table: The table of the row, with image tokens.
        row: Its index.
        max_length: See `Policy`.
    """
    if table.tiled is None:
        return ""
    tokens = int(table.image_tokens(row).sum())
    most = table.tiled.most_tiles(table.images(row), max_length - text_tokens(table, row))
    if tokens <= max_length:
        return f"; the row fits with model.max_tiles={most}" if most else ""
    fix = f"the row fits with model.max_tiles={most}" if most else "the row does not fit with any model.max_tiles"
    return f"; its images alone have {tokens:,} tokens: {fix}"


def text_tokens(table: EncodedTable, row: int) -> int:
    """Return the number of tokens of a row besides those of its images."""
    return int(table.starts[row + 1] - table.starts[row] - table.image_counts[row])


def without_bad_images(
    rows: EncodedRows,
    on_bad_image: OnBad,
    report: Report,
    inspect: Callable[[list[ImageName]], Mapping[ImageName, ImageFacts]],
) -> EncodedRows:
    """Drop or refuse rows whose images cannot be opened.

    Args:
        rows: From `select_rows`.
        on_bad_image: See `Policy`.
        report: Counts the dropped rows.
        inspect: Inspects images by their names.

    Returns:
        The remaining rows.

    Raises:
        UserError: If a row is refused; the message names the first one.
    """
    named = [rows.image_files(i) for i in range(len(rows))]
    found = inspect(list(dict.fromkeys(name for names in named for name in names)))
    good = []
    for index, names in enumerate(named):
        problem = next((found[name].problem for name in names if found[name].problem), None)
        if problem is None:
            good.append(index)
            kinds = {kind for name in names for kind, _ in found[name].oddities}
            report.repaired.update(kinds & {MATCHED, SCALED, TRANSPARENT})
            continue
        if on_bad_image == "error":
            raise UserError(f"{rows.row_name(index)}: {problem}; fix it or set data.on_bad_image=drop")
        report.dropped[BAD_IMAGE] += 1
    return rows if len(good) == len(rows) else rows.take(good)


def account(rows: EncodedRows, report: Report) -> None:
    """Complete the report on a split's rows.

    Raises:
        UserError: If no row is left.
    """
    if not len(rows):
        if not report.rows:
            raise UserError("the data has no rows; `lora-llava check` reads the same data")
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
        raise UserError(f"no row is left of {report.rows:,}: {reasons}; `lora-llava check` lists them")
    report.used = len(rows)
    report.tokens = int(rows.lengths.sum())
    report.supervised_tokens = int(rows.supervised.sum())
    report.longest = int(rows.lengths.max())
    for number, table in enumerate(rows.tables):
        mine = rows.places[rows.places[:, 0] == number, 1]
        for row in mine[np.isin(mine, table.notes.where())]:
            report.repaired.update(table.notes[int(row)].split("\0"))


def build_rows(
    conversations: Sequence[Conversation],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str | AnyTemplate,
    num_image_tokens: int | Mapping[str, int] | TiledImages,
    max_length: int,
    on_overlong: OnOverlong = "error",
    images: ImageSource | None = None,
    on_bad_image: OnBad = "error",
    progress: Callable[[Iterable[Read]], Iterable[Read]] = lambda rows: rows,
) -> tuple[EncodedRows, Report]:
    """Encode conversations in memory, and report on every one of them.

    Args:
        conversations: The rows.
        tokenizer: See `encode_conversation`.
        template: See `encode_conversation`.
        num_image_tokens: See `EncodedTable.with_image_tokens`.
        max_length: See `Policy`.
        on_overlong: See `Policy`.
        images: Opens the images, to find bad ones before training; None does not check them.
        on_bad_image: See `Policy`.
        progress: See `encode_table`.

    Returns:
        Rows with `row_id`, `input_ids`, `labels` and `image_files`, and the report.

    Raises:
        UserError: If a row is refused, or no row is left.
    """
    source = list_source("rows", conversations, images)  # type: ignore[arg-type]
    image_id: Any = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    table = encode_table(source, tokenizer=tokenizer, template=template, progress=progress)
    table = table.with_image_tokens(image_id, num_image_tokens)
    policy = Policy(max_length, on_overlong, "error", on_bad_image)
    places = np.stack([np.zeros(len(table), dtype=np.int64), np.arange(len(table))], axis=1)
    rows, report = select_rows([table], places, policy)
    if images is not None:
        rows = without_bad_images(
            rows, on_bad_image, report, lambda names: dict(inspect_images(images, own_names(names)).items())
        )
    account(rows, report)
    return rows, report
