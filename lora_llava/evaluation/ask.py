"""Asking the questions of a split, and marking what comes back."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from lora_llava.core.errors import ToldError, UserError
from lora_llava.data.conversation import Conversation
from lora_llava.data.files.reading import json_text
from lora_llava.evaluation.answer_log import AnswerLog
from lora_llava.evaluation.answer_metrics import EXACT, worst_scores
from lora_llava.evaluation.answerers import Answerer, messages_of
from lora_llava.evaluation.answers import AnsweredRow, AnswerTable, answer_table, score_answer
from lora_llava.evaluation.scienceqa import Prediction, Table, make_prediction, score
from lora_llava.inference.answer import Answer

Row = TypeVar("Row")
Mark = Callable[[int, Conversation, Answer], Any]
"""Marks the answer to the row of this index: a line of the predictions file."""
_HOPELESS = 8
"""Questions without an answer, and none with one, after which the others are not asked."""
_NAMED = 3
"""Rows whose trouble is told by name."""


class UnansweredError(ToldError):
    """Questions that got no answer though they were asked again; what was answered is kept."""


def choose_rows(rows: Sequence[Row], count: int | str, seed: int) -> list[Row]:
    """A fixed random subset, in the old order.

    Args:
        rows: All rows.
        count: How many, or `all`.
        seed: Draws them.
    """
    if count == "all" or int(count) >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), int(count)))]


def shuffle_images(rows: Sequence[Conversation], seed: int) -> list[Conversation]:
    """Give every row with images those of a row that has others: a model that looks must lose by it.

    Args:
        rows: Rows of which some have images; they are exchanged among rows with as many.
        seed: Draws the exchange.

    Returns:
        The rows; one keeps its own images only where more than half of those with as many have the same.
    """
    places = [i for i, row in enumerate(rows) if row.images]
    random.Random(seed).shuffle(places)
    shuffled = list(rows)
    for count in {len(rows[place].images) for place in places}:
        groups: dict[tuple[str, ...], list[int]] = {}
        for place in places:
            if len(rows[place].images) == count:
                groups.setdefault(rows[place].images, []).append(place)
        order = [place for group in groups.values() for place in group]
        step = max(map(len, groups.values()))  # so far on, no row of the same images is met
        for place, source in zip(order, order[step:] + order[:step], strict=True):
            shuffled[place] = replace(rows[place], images=rows[source].images)
    return shuffled


def ask_scienceqa(
    rows: Sequence[Conversation], answerer: Answerer, parser: str = "llava", **settings: Any
) -> tuple[Table, list[Prediction]]:
    """Ask ScienceQA's questions and score the answers.

    Args:
        rows: Conversations of ScienceQA.
        answerer: Who answers.
        parser: Reads the letters, a member of `PARSERS`.
        settings: As `ask_rows`.

    Returns:
        The table, and the marked answers in the rows' order.
    """

    def mark(index: int, row: Conversation, answer: Answer) -> Prediction:
        return make_prediction(row.row_id, answer.text, row.extra, answer.choice, parser)

    marked = ask_rows(rows, answerer, mark, **settings)
    return score(marked, parser), marked


def ask_conversations(
    rows: Sequence[Conversation], answerer: Answerer,
    losses: Callable[[], Mapping[int, tuple[float, int]]] | None = None, **settings: Any,
) -> tuple[AnswerTable, list[AnsweredRow]]:  # fmt: skip
    """Ask the last question of every conversation and mark the answers.

    Args:
        rows: Conversations; in `extra` the source's name, and the type of question where the data has one.
        answerer: Who answers.
        losses: Gives, once all is answered, summed loss and tokens of the data's own answers (`reference_losses`).
        settings: As `ask_rows`.

    Returns:
        The table, and the marked answers in the rows' order.
    """

    found = cache(losses or dict)

    def mark(index: int, row: Conversation, answer: Answer) -> AnsweredRow:
        question = row.turns[-2].words
        source, kind = str(row.extra.get("source", "")), row.extra.get("type")
        marked = score_answer(row.row_id, source, question, row.turns[-1].shown, answer.text, kind)
        known = found()
        if index in known:
            total, tokens = known[index]
            marked |= {"loss": round(total / tokens, 4), "loss_tokens": tokens}
        return marked

    marked = ask_rows(rows, answerer, mark, **settings)
    return answer_table(marked), marked


def questions_hash(rows: Sequence[Conversation]) -> str:
    """SHA-256 over what is asked: ids, turns up to the last answer, names of images, and choices."""
    asked = [[row.row_id, messages_of(row)[:-1], row.images, row.extra.get("choices")] for row in rows]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def ask_rows(
    rows: Sequence[Conversation],
    answerer: Answerer,
    mark: Mark,
    *,
    predictions: Path | None,
    description: str,
    key: Mapping[str, Any] | None = None,
    bad_images: str = "error",
) -> list[Any]:
    """Ask the last question of every row.

    Args:
        rows: Conversations.
        answerer: Who answers.
        mark: Marks an answer.
        predictions: File for one marked answer a line, in the rows' order; None writes none.
        description: Stands before the progress bar.
        key: What the answers depend on besides the questions; with it a stopped evaluation goes on where it was.
        bad_images: `error`, or `wrong`: a question whose image cannot be opened counts as answered wrongly, and its
            line says so.

    Returns:
        The marked answers, in the rows' order.

    Raises:
        UserError: For an image that cannot be opened.
        UnansweredError: Where a server left questions unanswered.
    """
    log = _open_log(predictions, rows, key)
    answers = dict(log.answers) if log is not None else {}
    before, unanswered = len(answers), dict[int, str]()
    bar = tqdm(
        total=len(rows), initial=len(answers), desc=description, unit="question", dynamic_ncols=True,
        leave=predictions is not None,
    )  # fmt: skip
    try:
        with bar:
            for index, answer in answerer(rows, frozenset(answers)):
                if answer.problem is not None and bad_images == "error" and answer.is_image:
                    raise UserError(
                        f"{rows[index].name}: {answer.problem}; restore it, or let such questions count as wrong "
                        "with --bad-images wrong"
                    )
                if answer.problem is not None and not answer.is_image:
                    unanswered[index] = answer.problem
                    if len(unanswered) >= _HOPELESS and len(answers) == before:
                        raise _unanswered(rows, unanswered)
                    continue
                bar.update()
                answers[index] = answer
                if log is not None and answer.problem is None:
                    log.add(index, answer)
    except KeyboardInterrupt:
        if log is not None:
            _tell(f"{len(answers):,} of {len(rows):,} answers are in {log.file}; the same command asks for the others")
        raise
    finally:
        if log is not None:
            log.close()
    if unanswered:
        raise _unanswered(rows, unanswered)
    _tell_bad(rows, answers)
    marked = [_mark(mark, index, rows[index], answers[index]) for index in range(len(rows))]
    if predictions is not None:
        write_predictions(predictions, marked)
    if log is not None:
        log.remove()
    return marked


def _open_log(
    predictions: Path | None, rows: Sequence[Conversation], key: Mapping[str, Any] | None
) -> AnswerLog | None:
    if predictions is None or key is None:
        return None
    file = predictions.with_suffix(".partial.jsonl")
    log = AnswerLog(file, {**key, "questions": questions_hash(rows)}, len(rows))
    if log.answers:
        _tell(f"{len(log.answers):,} of {len(rows):,} answers are in {file} already and are not asked again")
    elif log.other:
        _tell(f"{file} holds answers of another model, question or setting; this evaluation's are in {log.file}")
    if log.damaged:
        _tell(f"{log.damaged:,} lines of {log.file} cannot be read; what they answered is asked again")
    return log


def _tell(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _tell_bad(rows: Sequence[Conversation], answers: Mapping[int, Answer]) -> None:
    bad = [rows[index].named or rows[index].row_id for index in sorted(answers) if answers[index].problem is not None]
    if bad:
        what = "1 question counts as wrong because its image" if len(bad) == 1 else (
            f"{len(bad):,} questions count as wrong because their images"
        )  # fmt: skip
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        _tell(f"{what} cannot be opened: {', '.join(bad[:_NAMED])}{more}")


def _mark(mark: Mark, index: int, row: Conversation, answer: Answer) -> Any:
    marked = mark(index, row, answer)
    if answer.scores is not None:
        marked["scores"] = [round(score, 4) for score in answer.scores]
    if answer.problem is not None:
        marked["problem"] = answer.problem
        if EXACT in marked:  # no answer is wrong, whatever the reference
            marked |= worst_scores()
    return marked


def _unanswered(rows: Sequence[Conversation], problems: Mapping[int, str]) -> UnansweredError:
    named = "; ".join(
        f"{rows[index].named or rows[index].row_id}: {problem}" for index, problem in list(problems.items())[:_NAMED]
    )
    more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return UnansweredError(
        f"{len(problems):,} of {len(rows):,} questions got no answer ({named}{more}); the others are kept, and the "
        "same command asks only these again"
    )


def write_predictions(file: Path, predictions: Sequence[Any]) -> None:
    """Write predictions, one JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json_text(prediction) + "\n" for prediction in predictions]
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(file)
