"""Samples and rejections of a set with their images, boxes and captions, on one HTML page that needs nothing else."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from html import escape
from importlib import resources
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from lora_llava.data.images.reading import FolderImages
from lora_llava.pages.html_page import escape_line, escape_lines, write_page
from lora_llava.pages.preview_samples import count_of, escape_hidden
from lora_llava.synthesis.contexts.context import Context, write_context
from lora_llava.synthesis.dataset_card import BY_RULES, is_by_rules, teacher_name
from lora_llava.synthesis.gallery_image import COLOURS, draw_image
from lora_llava.synthesis.gates.gates import REASONS
from lora_llava.synthesis.parse import parse_sample
from lora_llava.synthesis.pipeline import Result
from lora_llava.synthesis.sample import FLAVOURS, Rejection, Task, Turns

ROWS, REJECTIONS = 30, 15
"""Shown at most."""
_MAX_PIXELS = 50_000_000
"""Of an image that is opened: what a recipe's `data.max_image_pixels` is by default."""
_LONGEST_ANSWER = 4000
"""Letters of a rejected answer that could not be read."""

AnswerOf = Callable[[Task, int], str | None]


@dataclass(frozen=True)
class Shown:
    """A sample, or an attempt at one that was not taken.

    Attributes:
        task: Which.
        attempt: Which try, from 0.
        turns: What was written, as far as it is known.
        rejection: Why it was not taken; None for a row.
    """

    task: Task
    attempt: int
    turns: Turns = ()
    rejection: Rejection | None = None


class Picks:
    """Draws by seed what is shown: as many rows of each flavour, and rejections of as many reasons, as there are.

    It holds a few of each, however many are added, and which they are does not depend on the order.

    Args:
        seed: Of the draw.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rows: dict[str, list[tuple[int, str, Shown]]] = {flavour: [] for flavour in FLAVOURS}
        self._rejections: dict[str, list[tuple[int, str, Shown]]] = {reason: [] for reason in REASONS}

    def add(self, result: Result) -> None:
        """Let a result take part in the draw."""
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
        """The rows, flavours in turn."""
        return _in_turn(self._rows.values(), ROWS)

    def rejections(self) -> list[Shown]:
        """The attempts that were not taken, reasons in turn."""
        return _in_turn(self._rejections.values(), REJECTIONS)


def _in_turn(heaps: Iterable[list[tuple[int, str, Shown]]], most: int) -> list[Shown]:
    drawn = ((shown for _, _, shown in sorted(heap, key=lambda item: (-item[0], item[1]))) for heap in heaps)
    return [shown for shown in chain.from_iterable(zip_longest(*drawn)) if shown is not None][:most]


def render_gallery(
    name: str, summary: Mapping[str, Any], picks: Picks, contexts: Sequence[Context], images: str | None,
    answer_of: AnswerOf | None = None,
) -> str:  # fmt: skip
    """Write the page.

    Args:
        name: Of the set.
        summary: As `summary.json` holds it.
        picks: What is shown; its texts may hold anything.
        contexts: What the tasks' places point into.
        images: The image folder; without it boxes are drawn on an empty frame.
        answer_of: Gives the text of a task's attempt; without it, rejections show their detail alone.

    Returns:
        One HTML document without scripts. It reaches no network: its Content-Security-Policy allows `data:` images
        and inline styles alone. It can be encoded as UTF-8, and holds no path of this machine.
    """
    folder = FolderImages(Path(images), _MAX_PIXELS) if images else None
    rows, rejections = picks.rows(), picks.rejections()
    articles = [_article(shown, contexts[shown.task.place], folder, answer_of) for shown in [*rows, *rejections]]
    style = resources.files("lora_llava.pages").joinpath("gallery.css").read_text(encoding="utf-8")
    nothing = '<p class="none">There is nothing to show.</p>'
    main = "\n".join(articles) or nothing
    body = f"{_head(name, summary)}\n{_toolbar(summary, rows, rejections)}\n<main>\n{main}\n</main>"
    return write_page(name, style, body)


def _head(name: str, summary: Mapping[str, Any]) -> str:
    ledger = summary.get("ledger", {})
    who = "lora_llava's rules" if is_by_rules(summary) else teacher_name(summary)
    tokens = ledger.get("prompt_tokens", 0) + ledger.get("completion_tokens", 0)
    facts = [
        ("rows", f"{summary['rows']:,} of {summary['tasks']:,}"), ("images", f"{summary['images']:,}"),
        ("questions", f"{summary['turns']:,}"), ("written by", who),
    ]  # fmt: skip
    facts += [("tokens", f"{tokens:,}")] if tokens else []
    facts += [("cost", f"{ledger['usd']:,.2f} USD")] if ledger.get("usd") else []
    notes = [BY_RULES] if is_by_rules(summary) else []
    if not summary["complete"]:
        notes.append(f"Not complete: {summary['failed']:,} had no answer, {summary['not_asked']:,} were not asked for.")
    return (
        f"<header><h1>{escape_line(name)}</h1>"
        "<p>Conversations about images, written from captions and boxes alone.</p>"
        + "<dl>"
        + "".join(f"<div><dt>{label}</dt><dd>{escape_line(value)}</dd></div>" for label, value in facts)
        + "</dl>"
        + (f'<ul class="notes">{"".join(f"<li>{escape_line(note)}</li>" for note in notes)}</ul>' if notes else "")
        + f'<div class="tables">{_flavours(summary)}{_reasons(summary)}</div></header>'
    )


def _flavours(summary: Mapping[str, Any]) -> str:
    titles = {"turns": "questions", "words_per_answer": "words an answer", "rejected": "rejected"}
    titles |= {name: told for name, told in (("failed", "no answer"), ("not_asked", "not asked for")) if summary[name]}
    head = "".join(f'<th scope="col">{title}</th>' for title in ("flavour", "rows", *titles.values()))
    body = "".join(
        f'<tr><th scope="row">{flavour}</th><td>{counts["rows"]:,} <small>of {counts["tasks"]:,}</small></td>'
        + "".join(f"<td>{'' if counts[name] is None else format(counts[name], ',')}</td>" for name in titles)
        + "</tr>"
        for flavour, counts in summary["flavours"].items()
    )
    return _card("Rows", f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>")


def _reasons(summary: Mapping[str, Any]) -> str:
    most = max((counts["attempts"] for counts in summary["reasons"].values()), default=0)
    body = "".join(
        f'<tr title="{escape_line(REASONS[reason])}"><th scope="row">{reason}</th><td>{counts["attempts"]:,}</td>'
        f'<td class="bar"><i style="width:{100 * counts["attempts"] / most:.1f}%"></i></td></tr>'
        for reason, counts in summary["reasons"].items()
    )
    return _card("Answers not taken", f'<tbody class="close">{body}</tbody>') if body else ""


def _card(title: str, table: str) -> str:
    return (
        f'<section class="card"><h2>{title}</h2><div class="wide" tabindex="0"><table>{table}</table></div></section>'
    )


def _toolbar(summary: Mapping[str, Any], rows: Sequence[Shown], rejections: Sequence[Shown]) -> str:
    """What is shown of all; without scripts, so the page's style does the choosing."""
    shown = {"all": len(rows) + len(rejections)}
    shown |= {flavour: sum(each.task.flavour == flavour for each in rows) for flavour in FLAVOURS}
    shown["rejected"] = len(rejections)
    choices = "".join(
        f'<input type="radio" name="show" id="show-{kind}"{" checked" * (kind == "all")}>'
        f'<label for="show-{kind}">{kind} <span>{count:,}</span></label>'
        for kind, count in shown.items()
        if count or kind == "all"
    )
    answers = sum(counts["attempts"] for counts in summary["reasons"].values())
    told = f"{len(rows):,} of {count_of(summary['rows'], 'row')}"
    told += f", {len(rejections):,} of {count_of(answers, 'answer')} not taken" if answers else ""
    return (
        f'<nav aria-label="What is shown">{choices}<input type="checkbox" id="boxes" checked>'
        f'<label for="boxes">boxes</label><span class="drawn">{told}, drawn by the seed</span></nav>'
    )


def _article(shown: Shown, context: Context, folder: FolderImages | None, answer_of: AnswerOf | None) -> str:
    flavour, rejection = shown.task.flavour, shown.rejection
    kind = "rejected" if rejection else flavour
    tries = f"<span>at attempt {shown.attempt + 1}</span>" if shown.attempt and not rejection else ""
    tries = f"<span>{flavour}, attempt {shown.attempt + 1}</span>" if rejection else tries
    why = ""
    if rejection:
        why = (
            f'<div class="why"><b>{escape_line(rejection.reason)}</b> {escape_line(REASONS[rejection.reason])}'
            f'<p class="text" dir="auto">{escape_line(rejection.detail)}</p></div>'
        )
    return (
        f'<article class="card {kind}"><div class="top"><span class="mark">{kind}</span>'
        f'<bdi class="id">{escape_line(shown.task.task_id)}</bdi>{tries}</div><div class="body">'
        f'<div class="seen">{draw_image(context, folder)}{_known(context)}</div>'
        f'<div class="said">{why}{_said(shown, answer_of)}</div></div></article>'
    )


def _known(context: Context) -> str:
    """What the teacher was given: captions, kinds of boxes, and all of it word for word."""
    counts: dict[str, int] = {}
    for box in context.boxes:
        counts[box.label] = counts.get(box.label, 0) + 1
    labels = "".join(
        f'<li class="b{number % COLOURS}">{escape_line(label)}{f" <b>{count}</b>" if count > 1 else ""}</li>'
        for number, (label, count) in enumerate(counts.items())
    )
    captions = "".join(f'<li dir="auto">{escape_line(caption)}</li>' for caption in context.captions)
    return (
        (f'<ul class="labels">{labels}</ul>' if labels else "")
        + (f'<ul class="captions">{captions}</ul>' if captions else "")
        + "<details><summary>as the teacher was given it</summary>"
        + f"<pre>{escape_lines(write_context(context))}</pre></details>"
    )


def _said(shown: Shown, answer_of: AnswerOf | None) -> str:
    """Questions and answers; of what could not be read, the text as it was."""
    turns, text = shown.turns, None
    if shown.rejection and not turns and answer_of:
        text = answer_of(shown.task, shown.attempt)
        read = parse_sample(text or "", shown.task.flavour)
        turns = () if isinstance(read, Rejection) else read
    find = _patterns(shown.rejection.detail) if shown.rejection else []
    if not turns:
        if text is None:
            return ""
        cut = f"\n[{len(text) - _LONGEST_ANSWER:,} letters more]" if len(text) > _LONGEST_ANSWER else ""
        return f'<pre class="raw">{next(_marked([text[:_LONGEST_ANSWER] + cut], find))}</pre>'
    parts = zip(turns, _marked([turn.text for turn in turns], find), strict=True)
    return "".join(
        f'<p class="text {"question" if turn.role == "user" else "answer"}" dir="auto">{html}</p>'
        for turn, html in parts
        if turn.text
    )


def _patterns(detail: str) -> list[re.Pattern[str]]:
    """Ways to find in a text what a rejection's detail quotes: as it stands but for spaces and case, else its words."""
    if re.match(r"U\+[0-9A-F]{4,6}\Z", detail):
        return [re.compile(re.escape(detail))]
    quoted = re.search(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", detail)
    found = re.sub(r"\\(.)", r"\1", quoted[0][1:-1]).removesuffix("...") if quoted else ""
    exact = r"\s+".join(map(re.escape, found.split()))
    words = r"[\W_]+".join(map(re.escape, re.findall(r"[^\W_]+", found)))
    # A short word, such as "no", is not looked for within others.
    ways = [exact if len(found) > 3 else rf"(?<!\w){exact}(?!\w)", rf"(?<!\w){words}(?!\w)"]
    return [re.compile(way, re.IGNORECASE) for way, part in zip(ways, (exact, words), strict=True) if part]


def _marked(texts: Sequence[str], patterns: Sequence[re.Pattern[str]]) -> Iterator[str]:
    """Texts as HTML, what is looked for marked where it stands first."""
    seen = ["\n".join(map(escape_hidden, text.replace("\r\n", "\n").split("\n"))) for text in texts]
    find = next((pattern for pattern in patterns if any(map(pattern.search, seen))), None)
    for text in seen:
        match = find.search(text) if find else None
        if match:
            find = None
            yield f"{escape(text[: match.start()])}<mark>{escape(match[0])}</mark>{escape(text[match.end() :])}"
        else:
            yield escape(text)
