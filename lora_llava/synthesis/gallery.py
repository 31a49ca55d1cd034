"""Draw samples and rejections of a set by seed, and collect what the gallery shows of them."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from lora_llava.data.images.image_sources import BadImageError, FolderImages
from lora_llava.pages.box_overlay import LabelledBox
from lora_llava.pages.embedded_image import EmbeddedImage, embed_image
from lora_llava.pages.gallery_page import (
    IMAGE_SIZE,
    JPEG_QUALITY,
    FlavourRow,
    FlavourTable,
    Gallery,
    GalleryEntry,
    GalleryRejection,
    GalleryTurn,
    MarkedText,
    ReasonCount,
    render_gallery_page,
)
from lora_llava.pages.preview_samples import count_of, escape_hidden
from lora_llava.synthesis.contexts.context import Context, write_context
from lora_llava.synthesis.dataset_card import BY_RULES, is_by_rules, teacher_name
from lora_llava.synthesis.gates.gates import REASONS
from lora_llava.synthesis.parse import parse_sample
from lora_llava.synthesis.pipeline import Result
from lora_llava.synthesis.sample import FLAVOURS, Rejection, Task, Turns

ROWS, REJECTIONS = 30, 15
"""Most samples and rejections that are shown."""
_MAX_PIXELS = 50_000_000
"""Most pixels of an image that is opened: the default of a recipe's `data.max_image_pixels`."""
_LONGEST_ANSWER = 4000
"""Most characters of a rejected answer that could not be parsed."""

AnswerOf = Callable[[Task, int], str | None]
"""Return the text of a task's attempt, if it is known."""


@dataclass(frozen=True)
class Shown:
    """A sample, or a rejected answer.

    Attributes:
        task: The sample's task.
        attempt: Number of the attempt, from 0.
        turns: Its questions and answers, as far as they are known.
        rejection: Why it was rejected; None for a sample.
    """

    task: Task
    attempt: int
    turns: Turns = ()
    rejection: Rejection | None = None


class Picks:
    """Draw by seed what is shown: samples of the flavours in turn, and rejections of the reasons in turn.

    Memory does not grow with the number of results, and their order does not change the draw.

    Args:
        seed: Seed of the draw.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rows: dict[str, list[tuple[int, str, Shown]]] = {flavour: [] for flavour in FLAVOURS}
        self._rejections: dict[str, list[tuple[int, str, Shown]]] = {reason: [] for reason in REASONS}

    def add(self, result: Result) -> None:
        """Add a result to the draw."""
        if result.status == "accepted":
            shown = Shown(result.task, len(result.rejections), result.turns)
            self._draw(self._rows[result.task.flavour], shown, ROWS)
        for attempt, rejection in enumerate(result.rejections):
            turns = result.turns if rejection.reason == "duplicate" else ()
            self._draw(self._rejections[rejection.reason], Shown(result.task, attempt, turns, rejection), REJECTIONS)

    def _draw(self, heap: list[tuple[int, str, Shown]], shown: Shown, most: int) -> None:
        name = f"{shown.task.task_id} {shown.attempt}"
        digest = blake2b(f"{self._seed} {name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        item = (-int.from_bytes(digest, "big"), name, shown)
        if len(heap) < most:
            heapq.heappush(heap, item)
        elif item > heap[0]:
            heapq.heapreplace(heap, item)

    def rows(self) -> list[Shown]:
        """Return the drawn samples, flavours in turn."""
        return _in_turn(self._rows.values(), ROWS)

    def rejections(self) -> list[Shown]:
        """Return the drawn rejections, reasons in turn."""
        return _in_turn(self._rejections.values(), REJECTIONS)


def _in_turn(heaps: Iterable[list[tuple[int, str, Shown]]], most: int) -> list[Shown]:
    drawn = ((shown for _, _, shown in sorted(heap, key=lambda item: (-item[0], item[1]))) for heap in heaps)
    return [shown for shown in chain.from_iterable(zip_longest(*drawn)) if shown is not None][:most]


def render_gallery(
    name: str,
    summary: Mapping[str, Any],
    picks: Picks,
    contexts: Sequence[Context],
    images: str | None,
    answer_of: AnswerOf | None = None,
) -> str:
    """Render the gallery of a set.

    Args:
        name: The set's name.
        summary: Content of `summary.json`.
        picks: What to show; its texts may hold anything.
        contexts: Contexts, indexed by the tasks' `place`.
        images: The image folder; without it, boxes are drawn on an empty frame.
        answer_of: Returns the text of a task's attempt; without it, rejections show only their detail.

    Returns:
        An HTML document as of `render_gallery_page`, without any path of this machine.
    """
    folder = FolderImages(Path(images), _MAX_PIXELS) if images else None
    rows, rejections = picks.rows(), picks.rejections()
    return render_gallery_page(
        Gallery(
            title=name,
            facts=_facts(summary),
            notes=_notes(summary),
            flavours=_flavours(summary),
            reasons=[
                ReasonCount(reason, REASONS[reason], counts["attempts"])
                for reason, counts in summary["reasons"].items()
            ],
            choices=_choices(rows, rejections),
            drawn=_drawn(summary, rows, rejections),
            entries=[_entry(shown, contexts[shown.task.place], folder, answer_of) for shown in [*rows, *rejections]],
        )
    )


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    ledger = summary.get("ledger", {})
    tokens = ledger.get("prompt_tokens", 0) + ledger.get("completion_tokens", 0)
    facts = [
        ("rows", f"{summary['rows']:,} of {summary['tasks']:,}"),
        ("images", f"{summary['images']:,}"),
        ("questions", f"{summary['turns']:,}"),
        ("written by", "lora_llava's rules" if is_by_rules(summary) else teacher_name(summary)),
    ]
    if tokens:
        facts.append(("tokens", f"{tokens:,}"))
    if ledger.get("usd"):
        facts.append(("cost", f"{ledger['usd']:,.2f} USD"))
    return facts


def _notes(summary: Mapping[str, Any]) -> list[str]:
    notes = [BY_RULES] if is_by_rules(summary) else []
    if not summary["complete"]:
        notes.append(f"Not complete: {summary['failed']:,} failed, {summary['not_asked']:,} were not requested.")
    return notes


def _flavours(summary: Mapping[str, Any]) -> FlavourTable:
    titles = {"turns": "questions", "words_per_answer": "words per answer", "rejected": "rejected"}
    titles |= {key: title for key, title in (("failed", "failed"), ("not_asked", "not requested")) if summary[key]}
    rows = [
        FlavourRow(flavour, counts["rows"], counts["tasks"], [counts[key] for key in titles])
        for flavour, counts in summary["flavours"].items()
    ]
    return FlavourTable(list(titles.values()), rows)


def _choices(rows: Sequence[Shown], rejections: Sequence[Shown]) -> list[tuple[str, int]]:
    counts = {flavour: sum(shown.task.flavour == flavour for shown in rows) for flavour in FLAVOURS}
    choices: list[tuple[str, int]] = [*counts.items(), ("rejected", len(rejections))]
    return [("all", len(rows) + len(rejections)), *(choice for choice in choices if choice[1])]


def _drawn(summary: Mapping[str, Any], rows: Sequence[Shown], rejections: Sequence[Shown]) -> str:
    text = f"{len(rows):,} of {count_of(summary['rows'], 'row')}"
    if answers := sum(counts["attempts"] for counts in summary["reasons"].values()):
        text += f", {len(rejections):,} of {count_of(answers, 'rejected answer')}"
    return f"{text}, drawn by the seed"


def _entry(shown: Shown, context: Context, folder: FolderImages | None, answer_of: AnswerOf | None) -> GalleryEntry:
    flavour, rejection = shown.task.flavour, shown.rejection
    attempt = f"at attempt {shown.attempt + 1}" if shown.attempt else ""
    image, error = _image(context.image, folder)
    turns, raw = _texts(shown, answer_of)
    return GalleryEntry(
        kind="rejected" if rejection else flavour,
        entry_id=shown.task.task_id,
        attempt=f"{flavour}, attempt {shown.attempt + 1}" if rejection else attempt,
        image_name=context.image,
        image=image,
        image_error=error,
        boxes=[LabelledBox(box.label, box.corners) for box in context.boxes],
        captions=context.captions,
        context=write_context(context),
        rejection=GalleryRejection(rejection.reason, REASONS[rejection.reason], rejection.detail)
        if rejection
        else None,
        turns=turns,
        raw=raw,
    )


def _image(name: str, folder: FolderImages | None) -> tuple[EmbeddedImage | None, str]:
    """Return the image, or None and why it cannot be shown."""
    if folder is None:
        return None, "no image folder was named"
    try:
        return embed_image(folder.open(name), JPEG_QUALITY, IMAGE_SIZE), ""
    except BadImageError as error:
        return None, error.kind  # its message may hold a path


def _texts(shown: Shown, answer_of: AnswerOf | None) -> tuple[list[GalleryTurn], MarkedText | None]:
    """Return the questions and answers or, where they cannot be parsed, the text of the answer."""
    turns, text = shown.turns, None
    if shown.rejection and not turns and answer_of:
        text = answer_of(shown.task, shown.attempt)
        parsed = parse_sample(text or "", shown.task.flavour)
        turns = () if isinstance(parsed, Rejection) else parsed
    patterns = _patterns(shown.rejection.detail) if shown.rejection else []
    if turns:
        marked = _mark([turn.text for turn in turns], patterns)
        return [
            GalleryTurn("question" if turn.role == "user" else "answer", part)
            for turn, part in zip(turns, marked, strict=True)
            if turn.text
        ], None
    if text is None:
        return [], None
    cut = f"\n[{len(text) - _LONGEST_ANSWER:,} letters more]" if len(text) > _LONGEST_ANSWER else ""
    return [], next(_mark([text[:_LONGEST_ANSWER] + cut], patterns))


def _patterns(detail: str) -> list[re.Pattern[str]]:
    """Return patterns that find what a rejection's detail quotes: as it is but for spaces and case, else its words."""
    if re.match(r"U\+[0-9A-F]{4,6}\Z", detail):
        return [re.compile(re.escape(detail))]
    quoted = re.search(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", detail)
    found = re.sub(r"\\(.)", r"\1", quoted[0][1:-1]).removesuffix("...") if quoted else ""
    exact = r"\s+".join(map(re.escape, found.split()))
    words = r"[\W_]+".join(map(re.escape, re.findall(r"[^\W_]+", found)))
    # A short word, such as "no", must not match inside another word.
    candidates = [exact if len(found) > 3 else rf"(?<!\w){exact}(?!\w)", rf"(?<!\w){words}(?!\w)"]
    return [
        re.compile(pattern, re.IGNORECASE) for pattern, part in zip(candidates, (exact, words), strict=True) if part
    ]


def _mark(texts: Sequence[str], patterns: Sequence[re.Pattern[str]]) -> Iterator[MarkedText]:
    """Mark the first match of the first pattern that matches any of the texts, their hidden characters shown."""
    visible = ["\n".join(map(escape_hidden, text.replace("\r\n", "\n").split("\n"))) for text in texts]
    pattern = next((pattern for pattern in patterns if any(map(pattern.search, visible))), None)
    for text in visible:
        match = pattern.search(text) if pattern else None
        if match:
            pattern = None
            yield MarkedText(text[: match.start()], match[0], text[match.end() :])
        else:
            yield MarkedText(text)
