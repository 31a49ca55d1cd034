"""`inspect.csv` and `inspect.html`: every row's figures, and the rows and images that deserve a look."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path

from lora_llava.core.storage import atomic_file
from lora_llava.data.images.image_sources import BadImageError
from lora_llava.evaluation.inspection.inspection import ImagePair, Inspection, RowFinding, SplitImage
from lora_llava.evaluation.inspection.near_duplicates import THRESHOLD
from lora_llava.evaluation.inspection.row_measures import GAIN_MARGIN
from lora_llava.evaluation.inspection.surprise import BY_ROWS
from lora_llava.pages.embedded_image import EmbeddedImage, embed_image
from lora_llava.pages.inspect_page import InspectItem, InspectList, InspectPage, render_inspect_page

CSV_FILE, PAGE_FILE = "inspect.csv", "inspect.html"
_SHOWN = 60
"""Most rows or pairs of a list on the page; the CSV has all."""
_LONGEST = 400
"""Most characters of a text on the page."""
_SIZE, _QUALITY = 224, 80
"""Pixels of an image's longer side, at most, and the quality of its JPEG."""
_COLUMNS = (
    "split",
    "source",
    "row",
    "row_id",
    "images",
    "question",
    "answer",
    "loss_with_image",
    "loss_shuffled_image",
    "loss_without_image",
    "gain_over_shuffled",
    "gain_over_none",
    "shuffles",
    "answer_tokens",
    "answer_probability",
    "gains_nothing",
    "surprising",
    "surprise",
    "surprise_rank",
    "compared_with",
    "answer_rank",
    "likelier_answer",
    "near_duplicates",
    "leak",
    "problem",
)


def write_inspection(inspection: Inspection, folder: Path) -> tuple[Path, Path]:
    """Write the table and the page.

    Args:
        inspection: What was found.
        folder: Folder of both files.

    Returns:
        The table and the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, page = folder / CSV_FILE, folder / PAGE_FILE
    with (
        atomic_file(table) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        writer = csv.writer(stream)
        writer.writerow(_COLUMNS)
        writer.writerows(_csv_rows(inspection))
    with atomic_file(page) as temporary:
        temporary.write_text(render_inspect_page(_page(inspection)), encoding="utf-8")
    return table, page


def _csv_rows(inspection: Inspection) -> Iterable[list[object]]:
    near: dict[SplitImage, list[tuple[SplitImage, ImagePair]]] = {}
    for pair in inspection.pairs:
        near.setdefault(pair.one, []).append((pair.two, pair))
        near.setdefault(pair.two, []).append((pair.one, pair))
    for each in inspection.findings:
        row = inspection.rows[each.place].row
        others = [found for name in row.images for found in near.get((each.split, name), [])]
        surprise = each.surprise
        blank = None if each.loss is None or each.blank is None else each.blank - each.loss
        yield [
            each.split,
            row.extra.get("source", ""),
            row.name,
            row.row_id,
            "; ".join(inspection.label((each.split, name)) for name in row.images),
            _text(inspection, each, "user"),
            _text(inspection, each, "assistant"),
            *map(_number, (each.loss, each.shuffled, each.blank, each.gain, blank)),
            each.shuffles or "",
            each.tokens or "",
            "" if each.loss is None else f"{math.exp(-each.loss * each.tokens):.4g}",
            _yes(each.gains_nothing) if each.gain is not None else "",
            _yes(each.is_surprising) if surprise else "",
            _number(surprise.score if surprise else None),
            each.surprise_rank or "",
            surprise.by if surprise else "",
            (surprise.rank or "") if surprise else "",
            surprise.likelier if surprise and surprise.rank > 1 else "",
            "; ".join(f"{_image_name(inspection, other)} ({pair.cosine:.3f})" for other, pair in others),
            _yes(any(pair.is_leak for _, pair in others)),
            each.problem,
        ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _text(inspection: Inspection, each: RowFinding, role: str) -> str:
    turns = inspection.rows[each.place].row.turns
    return "\n".join(turn.words if role == "user" else turn.shown for turn in turns if turn.role == role)


def _image_name(inspection: Inspection, image: SplitImage) -> str:
    return f"{inspection.label(image)} in {image[0]}"


def _page(inspection: Inspection) -> InspectPage:
    opened = inspection.opened
    counts = {split: sum(each.split == split for each in inspection.findings) for split in opened.splits}
    problems = inspection.problems()
    notes = [*opened.notes]
    if problems:
        first = problems[0]
        what = "1 row has" if len(problems) == 1 else f"{len(problems):,} rows have"
        notes.append(f"{what} no figures: {inspection.rows[first.place].row.name}: {first.problem}")
    facts = [
        ("run", str(opened.folder)),
        ("rows", ", ".join(f"{split} {count:,}" for split, count in counts.items())),
        ("images", f"{inspection.images:,}"),
        ("all figures", CSV_FILE),
    ]
    lists = [_surprising(inspection), _no_gain(inspection), _duplicates(inspection)]
    return InspectPage(f"{opened.folder.name}: rows that deserve a look", facts, notes, lists)


def _shown(count: int) -> str:
    return f"The first {_SHOWN} of {count:,}; {CSV_FILE} has all." if count > _SHOWN else ""


def _surprising(inspection: Inspection) -> InspectList:
    found = inspection.surprising()
    return InspectList(
        "surprising",
        "Surprising answers",
        len(found),
        "Likely mislabelled, or with another row's image. Where a question has few answers, each answer is predicted "
        "from the other rows, and listed if they point to another one; longer answers are listed if their loss is an "
        "outlier.",
        _shown(len(found)),
        [_item(inspection, each) for each in found[:_SHOWN]],
    )


def _no_gain(inspection: Inspection) -> InspectList:
    found = inspection.no_gain()
    return InspectList(
        "nothing",
        "Rows that gain nothing from their image",
        len(found),
        f"The answer's loss with the row's own image is at most {GAIN_MARGIN} nats per token below that with images "
        "of other rows: the question needs no image, its image is the wrong one, or the answer is wrong.",
        _shown(len(found)),
        [_item(inspection, each) for each in found[:_SHOWN]],
    )


def _duplicates(inspection: Inspection) -> InspectList:
    pairs = sorted(inspection.pairs, key=lambda pair: not pair.is_leak)
    leaks = sum(pair.is_leak for pair in pairs)
    return InspectList(
        "near",
        "Near-duplicate images",
        len(pairs),
        f"The cosine of the vision tower's features, without the mean of all images, is at least {THRESHOLD}. "
        + (f"{leaks:,} across splits: a held-out image is trained on." if leaks else "None is across splits."),
        _shown(len(pairs)),
        [_pair_item(inspection, pair) for pair in pairs[:_SHOWN]],
    )


def _item(inspection: Inspection, each: RowFinding) -> InspectItem:
    row, surprise = inspection.rows[each.place].row, each.surprise
    losses = {
        "loss with its image": each.loss,
        "with images of other rows": each.shuffled,
        "without an image": each.blank,
    }
    figures = [(name, f"{value:.3f}") for name, value in losses.items() if value is not None]
    likelier = ""
    if surprise is not None and surprise.is_surprising and surprise.by == BY_ROWS:
        likelier = surprise.likelier
    labels = ["gains nothing"] * each.gains_nothing + ["surprising"] * each.is_surprising
    return InspectItem(
        each.split,
        row.name,
        labels,
        *_embedded(inspection, [(each.split, name) for name in row.images]),
        _cut(_text(inspection, each, "user")),
        _cut(_text(inspection, each, "assistant")),
        likelier,
        figures,
    )


def _pair_item(inspection: Inspection, pair: ImagePair) -> InspectItem:
    one, two = pair.one, pair.two
    return InspectItem(
        one[0] if not pair.is_leak else f"{one[0]} and {two[0]}",
        f"cosine {pair.cosine:.3f}",
        ["leak"] if pair.is_leak else [],
        *_embedded(inspection, [one, two]),
    )


def _embedded(inspection: Inspection, images: list[SplitImage]) -> tuple[list[EmbeddedImage | None], list[str]]:
    found: list[EmbeddedImage | None] = []
    for split, name in images:
        try:
            found.append(embed_image(inspection.opened.splits[split].images.open(name), _QUALITY, _SIZE))  # type: ignore[arg-type]
        except BadImageError:
            found.append(None)
    return found, [inspection.label(image) for image in images]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
