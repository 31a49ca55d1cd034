"""Scores and figures as lines of text, for the terminal, the report page and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_llava.evaluation.answer_metrics import DASH, EXACT, METRICS, Metric
from lora_llava.evaluation.figures.confusion import OTHER, Confusion, read_confusion
from lora_llava.evaluation.figures.run_figures import AFTER, BEFORE, MAJORITY, SHUFFLED, WEIGHED
from lora_llava.evaluation.parsing.intervals import share_interval
from lora_llava.evaluation.summary import right_answers

TITLES = {
    MAJORITY: "majority answer",
    BEFORE: "before",
    WEIGHED: "before, likeliest",
    AFTER: "after",
    SHUFFLED: "images shuffled",
}
"""Names of lines; a table of another name keeps it."""
INTERVAL = "95% interval"
_MOST_NAMED = 3
"""Wrong answers that a line of `recall_cells` names."""


@dataclass(frozen=True)
class FigureLine:
    """One line of a table: the scores of one set of answers in one group of questions.

    Attributes:
        group: The group, such as `all` or `type: colour`.
        title: What was scored, such as `majority answer`.
        scores: The scores; see `group_scores`.
    """

    group: str
    title: str
    scores: Mapping[str, Any]


def figure_lines(tables: Mapping[str, Any], figures: Mapping[str, Any] | None = None) -> list[FigureLine]:
    """List the lines of tables of free answers with the figures beside them, group by group.

    Args:
        tables: Tables by name, such as `before` and `after`.
        figures: From `build_figures`; None or lacking in runs of earlier versions.
    """
    figures = figures or {}
    found: dict[str, Any] = {}
    found[MAJORITY] = (figures.get("majority") or {}).get("table")
    for name, table in tables.items():
        found[name] = table
        if name == BEFORE:
            found[WEIGHED] = figures.get(WEIGHED)
    found[SHUFFLED] = (figures.get("shuffled") or {}).get("table")
    known = {TITLES.get(name, name): table for name, table in found.items() if table}
    groups = dict.fromkeys(group for table in reversed(list(tables.values())) for group in table)
    return [FigureLine(group, title, t[group]) for group in groups for title, t in known.items() if group in t]


def line_notes(figures: Mapping[str, Any] | None) -> list[str]:
    """Describe the lines that the figures add to a table, one sentence each."""
    figures, found = figures or {}, []
    majority, shuffled = figures.get("majority") or {}, figures.get("shuffled") or {}
    if majority.get("table"):
        by = [name for name, key in (("type of question", "types"), ("question", "questions")) if majority.get(key)]
        about = f" to the same {' or '.join(by)}" if by else ""
        found.append(f"{TITLES[MAJORITY]}: always the most frequent answer of the training rows{about}.")
    if figures.get(WEIGHED):
        found.append(f"{TITLES[WEIGHED]}: the likeliest answer of the training rows, for questions with few answers.")
    if shuffled.get("table"):
        found.append(
            f"{TITLES[SHUFFLED]}: after training, {shuffled['rows']:,} of {shuffled['of']:,} rows with images, "
            "answered with the images of other rows."
        )
    return found


def headings(metrics: Sequence[Metric] | None = None) -> list[str]:
    """Return the headings of `cells`; None for all of `METRICS`."""
    return [each for metric in _of(metrics) for each in (metric.heading, *([INTERVAL] if metric.key == EXACT else []))]


def cells(line: FigureLine, metrics: Sequence[Metric] | None = None) -> list[str]:
    """Format the scores of a line: a cell for each metric, and the 95% interval of exact match behind it."""
    return [
        each
        for metric in _of(metrics)
        for each in (metric.cell(line.scores), *([interval_cell(line.scores)] if metric.key == EXACT else []))
    ]


def _of(metrics: Sequence[Metric] | None) -> Sequence[Metric]:
    return list(METRICS.values()) if metrics is None else metrics


def interval_cell(scores: Mapping[str, Any]) -> str:
    """Format the 95% interval of exact match, as `12.3–45.6`; a dash for no questions."""
    count = scores["questions"]
    if not count:
        return DASH
    low, high = share_interval(right_answers(scores), count)
    return f"{low:.1f}–{high:.1f}"


def read_confusions(figures: Mapping[str, Any] | None) -> list[Confusion]:
    """Return the confusion tables of saved figures."""
    return [read_confusion(saved) for saved in (figures or {}).get("confusion", [])]


def confusion_title(confusion: Confusion) -> str:
    """Return the title of a confusion table."""
    about = f", {confusion.group}" if confusion.group else ""
    return f"Confusion{about}: references down, answers across"


def balanced_note(confusion: Confusion, figures: Mapping[str, Any]) -> str:
    """Describe the balanced accuracy of a group's answers, beside those before training and the majority answer's."""
    known = figures.get("balanced_accuracy", {}).get(confusion.group, {})
    others = "; ".join(f"{TITLES[name]} {value:.2f}%" for name, value in known.items() if name in _BESIDE)
    beside = f" ({others})" if others else ""
    return f"Balanced accuracy, the mean of the recalls: {confusion.balanced_accuracy:.2f}%{beside}."


_BESIDE = (MAJORITY, BEFORE, WEIGHED)


def matrix(confusion: Confusion) -> tuple[list[str], list[list[str]]]:
    """Return a confusion table as headings and rows: references down, answers across, rows and recall.

    The column of other answers is left out where there are none.
    """
    other = any(counts[-1] for counts in confusion.counts)
    columns = ["reference", *confusion.answers, *([OTHER] if other else []), "rows", "recall in %"]
    rows = [
        [
            answer,
            *(f"{count:,}" for count in (counts if other else counts[:-1])),
            f"{sum(counts):,}",
            f"{confusion.recall(place):.2f}",
        ]
        for place, (answer, counts) in enumerate(zip(confusion.answers, confusion.counts, strict=True))
    ]
    return columns, rows


RECALL_HEADINGS = ("reference", "rows", "recall in %", INTERVAL, "answered instead")
"""Headings of `recall_cells`."""


def recall_cells(confusion: Confusion, saved: Mapping[str, Any]) -> list[list[str]]:
    """Return a line for each reference, with its rows, recall, interval, and the most frequent wrong answers.

    Args:
        confusion: The table.
        saved: Its `as_dict`.
    """
    found = []
    for place, answer in enumerate(confusion.answers):
        low, high = saved["classes"][answer]["recall_interval"]
        wrong = confusion.instead(place)
        named = ", ".join(f"{name} {count:,}" for name, count in wrong[:_MOST_NAMED])
        more = f" and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
        rows = sum(confusion.counts[place])
        found.append(
            [answer, f"{rows:,}", f"{confusion.recall(place):.2f}", f"{low:.1f}–{high:.1f}", named + more or DASH]
        )
    return found
