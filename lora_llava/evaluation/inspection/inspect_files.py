"""`inspect.csv` and `inspect.html`: every row's figures, and the rows and images that deserve a look."""

from __future__ import annotations

import csv
import math
from collections.abc import Container, Iterable
from pathlib import Path

from lora_llava.core.storage import atomic_file
from lora_llava.data.images.image_sources import BadImageError
from lora_llava.evaluation.inspection.inspection import ImageGroup, Inspection, RowFinding, SplitImage
from lora_llava.evaluation.inspection.near_duplicates import THRESHOLD
from lora_llava.evaluation.inspection.row_measures import GAIN_MARGIN
from lora_llava.evaluation.inspection.surprise import BY_ROWS
from lora_llava.pages.embedded_image import EmbeddedImage, embed_image
from lora_llava.pages.inspect_page import InspectItem, InspectList, InspectPage, render_inspect_page

CSV_FILE, PAGE_FILE = "inspect.csv", "inspect.html"
_SHOWN = 60
"""Most rows or groups of a list on the page; the CSV has all."""
_NAMED = 5
"""Most near-duplicates that a line of the CSV names, and most images of a group on the page."""
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
    "image_suspect",
    "near_duplicates",
    "nearest_cosine",
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
    near: dict[SplitImage, tuple[ImageGroup, SplitImage, float]] = {
        image: (group, nearest, cosine)
        for group in inspection.groups
        for image, nearest, cosine in zip(group.images, group.nearest, group.cosines, strict=True)
    }
    suspect = inspection.suspect_images()
    for each in inspection.findings:
        row = inspection.rows[each.place].row
        mine = [(each.split, name) for name in row.images]
        groups = [near[image] for image in mine if image in near]
        others = [nearest for _, nearest, _ in groups] + [image for group, *_ in groups for image in group.images]
        others = [image for image in dict.fromkeys(others) if image not in mine]
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
            _yes(any(image in suspect for image in mine)) if mine else "",
            _named(inspection, others),
            _number(max((cosine for *_, cosine in groups), default=None)),
            _yes(any(group.is_leak for group, *_ in groups)),
            each.problem,
        ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _text(inspection: Inspection, each: RowFinding, role: str) -> str:
    turns = inspection.rows[each.place].row.turns
    return "\n".join(turn.words if role == "user" else turn.shown for turn in turns if turn.role == role)


def _named(inspection: Inspection, images: list[SplitImage]) -> str:
    """Name the first images with their splits, and count the others."""
    names = [f"{inspection.label(image)} in {image[0]}" for image in images[:_NAMED]]
    more = len(images) - len(names)
    return "; ".join([*names, *([f"and {more:,} more"] if more else [])])


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
    found, suspect = inspection.surprising(), inspection.suspect_images()
    return InspectList(
        "surprising",
        "Surprising answers",
        len(found),
        "Likely mislabelled, or with another row's image; if all rows of an image are listed, the image is likelier "
        "wrong. Where a question has few answers, each answer is predicted from the other rows, and listed if they "
        "point to another one; longer answers are listed if their loss is an outlier.",
        _shown(len(found)),
        [_item(inspection, each, suspect) for each in found[:_SHOWN]],
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
    groups = sorted(inspection.groups, key=lambda group: not group.is_leak)
    leaks = sum(group.is_leak for group in groups)
    return InspectList(
        "near",
        "Groups of near-duplicate images",
        len(groups),
        f"The cosine of the vision tower's features, without the mean of all images, is at least {THRESHOLD}. "
        + (f"{leaks:,} across splits: a held-out image is trained on." if leaks else "None is across splits."),
        _shown(len(groups)),
        [_group_item(inspection, group) for group in groups[:_SHOWN]],
    )


def _item(inspection: Inspection, each: RowFinding, suspect: Container[SplitImage] = ()) -> InspectItem:
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
    labels += ["all rows of its image are"] * any((each.split, name) in suspect for name in row.images)
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


def _group_item(inspection: Inspection, group: ImageGroup) -> InspectItem:
    splits = list(dict.fromkeys(split for split, _ in group.images))
    shown = [next(image for image in group.images if image[0] == split) for split in splits]  # one of each split
    shown += [image for image in group.images if image not in shown][: max(0, _NAMED - len(shown))]
    count = f"the first {len(shown)} of {len(group.images):,} images, " if len(group.images) > len(shown) else ""
    return InspectItem(
        " and ".join(splits),
        f"{count}cosine {max(group.cosines):.3f}",
        ["leak"] if group.is_leak else [],
        *_embedded(inspection, shown),
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
