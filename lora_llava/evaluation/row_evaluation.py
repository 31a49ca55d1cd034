"""Evaluate rows: have their questions answered, score the answers and write the predictions file."""

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

from lora_llava.core.errors import ReportedError, UserError
from lora_llava.core.progress import progress_bar
from lora_llava.core.storage import atomic_file
from lora_llava.data.conversation import Conversation
from lora_llava.data.files.row_files import json_text
from lora_llava.data.images.image_id import ImageName, saved_name
from lora_llava.evaluation.answer_log import AnswerLog
from lora_llava.evaluation.answer_metrics import EXACT, worst_scores
from lora_llava.evaluation.answerers import Answerer, messages_of
from lora_llava.evaluation.answers import AnsweredRow, AnswerTable, answer_table, score_answer
from lora_llava.evaluation.scienceqa import Prediction, Table, make_prediction, score
from lora_llava.inference.answer import Answer

Row = TypeVar("Row")
ScoreRow = Callable[[int, Conversation, Answer], Any]
"""Scores the answer to the row of an index; returns a line of the predictions file."""
_HOPELESS = 8
"""Number of failed questions after which the evaluation stops, if none has been answered."""
_NAMED = 3
"""Number of rows that a message names."""


class UnansweredError(ReportedError):
    """Questions stayed unanswered after all retries; the other answers are kept."""


def choose_rows(rows: Sequence[Row], count: int | str, seed: int) -> list[Row]:
    """Choose a random subset of rows, in their order.

    Args:
        rows: All rows.
        count: Number of rows, or `all`.
        seed: Seed of the choice.
    """
    if count == "all" or int(count) >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), int(count)))]


def shuffle_images(rows: Sequence[Conversation], seed: int) -> list[Conversation]:
    """Give every row with images the images of another row.

    A model that uses the images must score worse on the result.

    Args:
        rows: The rows. Images are shuffled among rows with the same number of images.
        seed: Seed of the shuffle.

    Returns:
        The rows. A row keeps its images only if more than half of the rows with as many images have the same ones.
    """
    places = [i for i, row in enumerate(rows) if row.images]
    random.Random(seed).shuffle(places)
    shuffled = list(rows)
    for count in {len(rows[place].images) for place in places}:
        groups: dict[tuple[ImageName, ...], list[int]] = {}
        for place in places:
            if len(rows[place].images) == count:
                groups.setdefault(rows[place].images, []).append(place)
        order = [place for group in groups.values() for place in group]
        step = max(map(len, groups.values()))  # this far on, no row has the same images
        for place, source in zip(order, order[step:] + order[:step], strict=True):
            shuffled[place] = replace(rows[place], images=rows[source].images)
    return shuffled


def evaluate_scienceqa(
    rows: Sequence[Conversation], answerer: Answerer, parser: str = "llava", **settings: Any
) -> tuple[Table, list[Prediction]]:
    """Evaluate ScienceQA's questions.

    Args:
        rows: Conversations of ScienceQA.
        answerer: Answers the questions.
        parser: Parser of the letters, a member of `PARSERS`.
        settings: As in `evaluate_rows`.

    Returns:
        The table, and the scored answers in the order of the rows.
    """

    def score_row(index: int, row: Conversation, answer: Answer) -> Prediction:
        return make_prediction(row.row_id, answer.text, row.extra, answer.choice, parser)

    scored = evaluate_rows(rows, answerer, score_row, **settings)
    return score(scored, parser), scored


def evaluate_conversations(
    rows: Sequence[Conversation],
    answerer: Answerer,
    losses: Callable[[], Mapping[int, tuple[float, int]]] | None = None,
    **settings: Any,
) -> tuple[AnswerTable, list[AnsweredRow]]:
    """Evaluate the last question of every conversation.

    Args:
        rows: Conversations; `extra` has the name of the source, and the type of question if the data names one.
        answerer: Answers the questions.
        losses: Returns summed loss and tokens of the reference answers (`reference_losses`); called after all answers.
        settings: As in `evaluate_rows`.

    Returns:
        The table, and the scored answers in the order of the rows.
    """

    found = cache(losses or dict)

    def score_row(index: int, row: Conversation, answer: Answer) -> AnsweredRow:
        question = row.turns[-2].words
        source, kind = str(row.extra.get("source", "")), row.extra.get("type")
        scored = score_answer(row.row_id, source, question, row.turns[-1].shown, answer.text, kind)
        known = found()
        if index in known:
            total, tokens = known[index]
            scored |= {"loss": round(total / tokens, 4), "loss_tokens": tokens}
        return scored

    scored = evaluate_rows(rows, answerer, score_row, **settings)
    return answer_table(scored), scored


def questions_hash(rows: Sequence[Conversation]) -> str:
    """Return the SHA-256 over the questions: ids, turns up to the last answer, names of images, and choices."""
    questions = [
        [row.row_id, messages_of(row)[:-1], [*map(saved_name, row.images)], row.extra.get("choices")] for row in rows
    ]
    return hashlib.sha256(json.dumps(questions).encode()).hexdigest()


def evaluate_rows(
    rows: Sequence[Conversation],
    answerer: Answerer,
    score_row: ScoreRow,
    *,
    predictions: Path | None,
    description: str,
    key: Mapping[str, Any] | None = None,
    bad_images: str = "error",
) -> list[Any]:
    """Answer the last question of every row and score the answers.

    Args:
        rows: Conversations.
        answerer: Answers the questions.
        score_row: Scores an answer.
        predictions: File for one scored answer per line, in the order of the rows; None writes no file.
        description: Label of the progress bar.
        key: All that the answers depend on besides the questions; with it a stopped evaluation resumes.
        bad_images: `error`, or `wrong`: a question whose image cannot be opened counts as wrong, and its line has the
            key `problem`.

    Returns:
        The scored answers, in the order of the rows.

    Raises:
        UserError: If an image cannot be opened.
        UnansweredError: If a server left questions unanswered.
    """
    log = _open_log(predictions, rows, key)
    answers = dict(log.answers) if log is not None else {}
    before, unanswered = len(answers), dict[int, str]()
    bar = progress_bar(
        total=len(rows),
        initial=len(answers),
        desc=description,
        unit="question",
        leave=predictions is not None,
    )
    try:
        with bar:
            for index, answer in answerer(rows, frozenset(answers)):
                if answer.problem is not None and bad_images == "error" and answer.is_image:
                    raise UserError(
                        f"{rows[index].name}: {answer.problem}; restore it, or count such questions as wrong "
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
            report(f"{len(answers):,} of {len(rows):,} answers are in {log.file}; run the same command to resume")
        raise
    finally:
        if log is not None:
            log.close()
    if unanswered:
        raise _unanswered(rows, unanswered)
    _report_bad_images(rows, answers)
    scored = [_score(score_row, index, rows[index], answers[index]) for index in range(len(rows))]
    if predictions is not None:
        write_predictions(predictions, scored)
    if log is not None:
        log.remove()
    return scored


def _open_log(
    predictions: Path | None, rows: Sequence[Conversation], key: Mapping[str, Any] | None
) -> AnswerLog | None:
    if predictions is None or key is None:
        return None
    log = AnswerLog(predictions, {**key, "questions": questions_hash(rows)}, len(rows))
    if log.answers:
        report(f"{len(log.answers):,} of {len(rows):,} answers are in {log.file} already and are kept")
    elif log.others:
        names = ", ".join(log.others)
        report(f"{names}: answers of another model, question or setting; this evaluation writes to {log.file.name}")
    return log


def report(text: str) -> None:
    """Print a line to the error stream, above a progress bar."""
    tqdm.write(text, file=sys.stderr)


def _report_bad_images(rows: Sequence[Conversation], answers: Mapping[int, Answer]) -> None:
    bad = [rows[index].named or rows[index].row_id for index in sorted(answers) if answers[index].problem is not None]
    if bad:
        what = (
            "1 question counts as wrong because its image"
            if len(bad) == 1
            else (f"{len(bad):,} questions count as wrong because their images")
        )
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        report(f"{what} cannot be opened: {', '.join(bad[:_NAMED])}{more}")


def _score(score_row: ScoreRow, index: int, row: Conversation, answer: Answer) -> Any:
    scored = score_row(index, row, answer)
    if answer.scores is not None:
        scored["scores"] = [round(score, 4) for score in answer.scores]
    if answer.problem is not None:
        scored["problem"] = answer.problem
        if EXACT in scored:  # no answer is wrong, whatever the reference
            scored |= worst_scores()
    return scored


def _unanswered(rows: Sequence[Conversation], problems: Mapping[int, str]) -> UnansweredError:
    named = "; ".join(
        f"{rows[index].named or rows[index].row_id}: {problem}" for index, problem in list(problems.items())[:_NAMED]
    )
    more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return UnansweredError(
        f"{len(problems):,} of {len(rows):,} questions got no answer ({named}{more}); the other answers are kept; "
        "run the same command to evaluate only these"
    )


def write_predictions(file: Path, predictions: Sequence[Any]) -> None:
    """Write predictions, one JSON object per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json_text(prediction) + "\n" for prediction in predictions]
    with atomic_file(file) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
