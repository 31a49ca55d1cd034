"""The figures beside a score: majority answer, images shuffled, 95% intervals, confusion, and gains in sentences."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_llava.data.conversation import Conversation
from lora_llava.evaluation.answer_metrics import EXACT, METRICS
from lora_llava.evaluation.answers import AnsweredRow, answer_table
from lora_llava.evaluation.figures.confusion import Confusion, confusions
from lora_llava.evaluation.figures.majority import MajorityAnswers, majority_rows
from lora_llava.evaluation.figures.significance import LEVEL, Gain, describe_gain, measure_gain, percent, write_p
from lora_llava.evaluation.parsing.normal import normalise
from lora_llava.evaluation.summary import table_intervals

MAJORITY, BEFORE, WEIGHED, AFTER, SHUFFLED = "majority", "before", "before_by_likelihood", "after", "shuffled"
ANSWERS = "answers"
"""Name of the answers of an evaluation, of which it is not known whether the model is trained."""
_STARTS = {BEFORE: "Before training", AFTER: "After training"}
_NAMED = 5
"""Most types that a sentence names."""
_UNSEEN_ROWS = 5
"""Rows of an answer of which none is right that a sentence about it needs."""
_CROWDED = 1.5
"""Rows per image above which a sentence says that rows of one image are not independent."""


@dataclass(frozen=True)
class ShuffledImages:
    """Answers of the trained model to some rows with the images of other rows.

    Attributes:
        share: The share of rows that the recipe asks for.
        places: Indices of the rows among those evaluated.
        scored: Lines of its predictions file.
    """

    share: float
    places: Sequence[int]
    scored: Sequence[AnsweredRow]


def build_figures(
    answers: Mapping[str, Sequence[AnsweredRow]],
    rows: Sequence[Conversation],
    majority: MajorityAnswers | None,
    shuffled: ShuffledImages | None = None,
    what: str = "held-out rows",
) -> dict[str, Any]:
    """Build the figures of a run or an evaluation from its answers.

    Args:
        answers: Lines of predictions files by name, in order: `before`, `before_by_likelihood`, `after`, or another
            name for the answers of an evaluation. The last are those of `rows`; the others may have other rows.
        rows: The evaluated rows.
        majority: Counts of the training answers; None if they are unknown.
        shuffled: Answers with images shuffled, if there are some.
        what: What the rows are, in the plural, for the sentences.

    Returns:
        `majority` (counts, and the table of its scores), `before_by_likelihood` and `shuffled` (tables), `intervals`
        (95%, by name and group), `gains`, `confusion` of the last answers, `balanced_accuracy` by group and name, and
        `sentences` for a person. A value that does not exist is None or empty.
    """
    name, last = list(answers)[-1], list(list(answers.values())[-1])
    named = [row.extra.get("type") for row in rows]
    scored = dict(answers)
    if majority is not None and majority.exists:
        scored = {MAJORITY: majority_rows(majority, last, named), **scored}
    if shuffled is not None and shuffled.scored:
        scored[SHUFFLED] = shuffled.scored
    tables = {each: answer_table(found) for each, found in scored.items()}
    gains = _gains(scored, name)
    confused = confusions(last, named)
    about = _without_gain(tables, name), _never_right(confused)
    return {
        "majority": {**majority.as_dict(), "table": tables.get(MAJORITY)} if majority is not None else None,
        "before_by_likelihood": tables.get(WEIGHED),
        "shuffled": _about_shuffled(shuffled, last, sum(bool(row.images) for row in rows)),
        "intervals": {each: table_intervals(table) for each, table in tables.items()},
        "gains": [gain.as_dict() for gain in gains],
        "confusion": [found.as_dict() for found in confused],
        "balanced_accuracy": _balanced({each: found for each, found in scored.items() if each != SHUFFLED}, rows),
        "sentences": _sentences(gains, *about, majority, last, rows, shuffled, what),
    }


def _gains(scored: Mapping[str, Sequence[AnsweredRow]], name: str) -> list[Gain]:
    """Compare the last answers with the majority answer and with the better score before training."""
    found = []
    for over in _compared(scored, name):
        pairs = paired(scored[name], scored[over])
        if pairs:
            found.append(measure_gain(name, over, *zip(*pairs, strict=True)))
    if SHUFFLED in scored and (pairs := paired(scored[name], scored[SHUFFLED])):
        found.append(measure_gain(name, SHUFFLED, *zip(*pairs, strict=True)))
    return found


def _compared(scored: Mapping[str, Sequence[AnsweredRow]], name: str) -> list[str]:
    earlier = [each for each in (BEFORE, WEIGHED) if each in scored and each != name and scored[each]]
    best = max(earlier, key=lambda each: sum(row[EXACT] for row in scored[each]) / len(scored[each]), default=None)
    return [each for each in (MAJORITY, best) if each is not None and each in scored]


def paired(first: Sequence[AnsweredRow], second: Sequence[AnsweredRow]) -> list[tuple[bool, bool]]:
    """Return whether each row that both answered was answered right by the first and by the second."""
    waiting: defaultdict[tuple[str, ...], deque[bool]] = defaultdict(deque)
    for row in second:
        waiting[_identity(row)].append(bool(row[EXACT]))
    return [(bool(row[EXACT]), waiting[identity].popleft()) for row in first if waiting[identity := _identity(row)]]


def _identity(row: AnsweredRow) -> tuple[str, ...]:
    return row["question_id"], row.get("source", ""), row["question"], row["reference"]


def _about_shuffled(
    shuffled: ShuffledImages | None, last: Sequence[AnsweredRow], with_images: int
) -> dict[str, Any] | None:
    if shuffled is None:
        return None
    return {
        "share": shuffled.share,
        "rows": len(shuffled.scored),
        "of": with_images,
        "table": answer_table(shuffled.scored) if shuffled.scored else None,
        "own_images": answer_table(last[place] for place in shuffled.places) if shuffled.scored else None,
    }


def _balanced(scored: Mapping[str, Sequence[AnsweredRow]], rows: Sequence[Conversation]) -> dict[str, dict[str, float]]:
    """Return the balanced accuracy of each set of answers to all the rows, by group of few answers."""
    named = [row.extra.get("type") for row in rows]
    found: dict[str, dict[str, float]] = {}
    for name, lines in scored.items():
        if len(lines) == len(rows):
            for each in confusions(lines, named):
                found.setdefault(each.group, {})[name] = each.balanced_accuracy
    return found


def _without_gain(tables: Mapping[str, Any], name: str) -> list[str]:
    """Describe the types of question on which the last answers are no better than the majority answer."""
    key = METRICS[EXACT].saved_as
    pairs = {
        group: (scores, tables[MAJORITY][group])
        for group, scores in tables[name].items()
        if group.startswith("type: ") and MAJORITY in tables
    }
    found = [
        f"{group} ({ours[key]:.2f}% of {ours['questions']:,} rows, majority answer {theirs[key]:.2f}%)"
        for group, (ours, theirs) in pairs.items()
        if ours[key] <= theirs[key]
    ]
    more = f" and {len(found) - _NAMED:,} more types" if len(found) > _NAMED else ""
    return [f"No gain over the majority answer in {', '.join(found[:_NAMED])}{more}."] if found else []


def _never_right(found: Sequence[Confusion]) -> list[str]:
    """Describe the answers of which no row is right, where other answers are."""
    missed = [
        (each.group, answer, sum(each.counts[place]))
        for each in found
        for place, answer in enumerate(each.answers)
        if each.right and not each.counts[place][place] and sum(each.counts[place]) >= _UNSEEN_ROWS
    ]
    named = ", ".join(
        f"{answer!r} ({rows:,} rows{f', {group}' if group else ''})" for group, answer, rows in missed[:_NAMED]
    )
    more = f" and {len(missed) - _NAMED:,} more answers" if len(missed) > _NAMED else ""
    return [f"No row is right where the answer is {named}{more}."] if missed else []


def _sentences(
    gains: Sequence[Gain],
    without_gain: Sequence[str],
    never_right: Sequence[str],
    majority: MajorityAnswers | None,
    last: Sequence[AnsweredRow],
    rows: Sequence[Conversation],
    shuffled: ShuffledImages | None,
    what: str,
) -> list[str]:
    found = []
    overs = {
        MAJORITY: "the majority answer of the training rows",
        BEFORE: "the model before training",
        WEIGHED: "the model before training, by likelihood",
    }
    for gain in gains:
        if gain.over == SHUFFLED:
            found.append(_describe_shuffled(gain, what))
        else:
            found.append(describe_gain(gain, _STARTS.get(gain.of, "With the model"), overs[gain.over], what))
            found += without_gain if gain.over == MAJORITY else []
    found += never_right
    if majority is not None and not majority.exists:
        found.append("No answer occurs twice in the training rows, so there is no majority answer to compare with.")
    if shuffled is not None and not shuffled.scored and any(row.images for row in rows):
        found.append(f"Images could not be shuffled: too few {what} have different images.")
    if last and len({normalise(row["reference"]) for row in last}) == 1:
        found.append(
            f"All {len(last):,} {what} have the answer {last[0]['reference'].strip()!r}: these scores do not "
            "show whether the model can distinguish answers."
        )
    images = {row.images for row in rows if row.images}
    with_images = sum(bool(row.images) for row in rows)
    if gains and images and with_images > _CROWDED * len(images):
        found.append(
            f"{with_images:,} {what} share {len(images):,} image{'s' * (len(images) != 1)}; rows of one image "
            "are not independent, so the intervals are too narrow and the p values too small."
        )
    return found


def _describe_shuffled(gain: Gain, what: str) -> str:
    scores = (
        f"with the images of other rows, {percent(gain.right_before, gain.rows)} of {gain.rows:,} {what} are "
        f"right, with their own images {percent(gain.right, gain.rows)}"
    )
    if gain.gained > gain.lost and gain.p < LEVEL:
        return f"The model uses the images: {scores} (McNemar's exact test, {write_p(gain.p)})."
    return f"These rows do not show that the model uses the images: {scores} (McNemar's exact test, {write_p(gain.p)})."
