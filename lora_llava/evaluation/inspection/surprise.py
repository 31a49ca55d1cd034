"""Rows whose answer is surprising: other rows of the data, or the model itself, expect another one.

A model that has seen a wrong answer often enough believes it, so its own loss finds few of them. Where a question has
few answers, each row's answer is therefore predicted from the other rows: ridge regression from the model's state
before the answer to the answers of all rows, with the exact prediction of each row from all rows but those that ask the
same about the same images: they have the same state, so that a wrong answer among them would make the right one look
wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_llava.data.conversation import Conversation
from lora_llava.evaluation.parsing.normal import normalise

BY_ROWS, BY_MODEL = "other rows", "the model"
"""What an answer is compared with."""
_SEEN = 3
"""Rows that an answer needs to be one of a question's few answers."""
_MOST_ANSWERS = 50
_LEAST_ROWS = 20
"""Most answers and least rows of a group whose answers are predicted from other rows."""
_COVERED = 0.8
"""Share of a group's rows whose answer is one of the few."""
_PREDICTABLE = 0.75
"""Least share of a group's answers that other rows predict; below it, their predictions say little about one row."""
_TOGETHER = 50
"""Most rows of the same images and question that are left out together; of more, a few wrong ones change little."""
_PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Ridge penalties to choose from, per row, for states of length 1."""
_FAR = 3.5
"""Robust z above which a value is an outlier (Iglewicz and Hoaglin, How to detect and handle outliers, 1993)."""
_TO_SIGMA = 1.4826
"""The standard deviation of a normal distribution in units of its median absolute deviation."""


@dataclass(frozen=True)
class Surprise:
    """How surprising a row's answer is.

    Attributes:
        by: `BY_ROWS` or `BY_MODEL`.
        score: By other rows, the score of the likeliest other answer minus that of the given one, from -1 to 1 in
            clear cases; by the model, how far the loss is beyond an outlier's, from -1 to 1. Above 0, the answer is
            surprising.
        rank: Place of the given answer among those that other rows have, from 1; 0 by the model.
        likelier: The likeliest other answer; "" by the model.
    """

    by: str
    score: float
    rank: int = 0
    likelier: str = ""

    @property
    def is_surprising(self) -> bool:
        return self.score > 0


def find_surprises(rows: Sequence[Conversation], states: np.ndarray, excess: np.ndarray) -> list[Surprise | None]:
    """Find surprising answers.

    Args:
        rows: Conversations that end with the answer of the data.
        states: The model's state before each answer, shape (rows, hidden size).
        excess: Nats per answer token above what the model expected, shape (rows,); NaN for rows without measures.

    Returns:
        The surprise of each row; None for rows without measures.
    """
    found: list[Surprise | None] = [None] * len(rows)
    measured = [i for i in range(len(rows)) if np.isfinite(excess[i])]
    left = set(measured)
    for group in few_answer_groups(rows, measured):
        predicted = _by_rows([rows[i] for i in group], states[group])
        if sum(not surprise.is_surprising for surprise in predicted) < _PREDICTABLE * len(group):
            continue
        left -= set(group)
        for i, surprise in zip(group, predicted, strict=True):
            found[i] = surprise
    free = sorted(left)
    for i, z in zip(free, _robust_z(excess[free]), strict=True):
        found[i] = Surprise(BY_MODEL, float(np.tanh(z / _FAR - 1)))
    return found


def given_answer(row: Conversation) -> str:
    """Return a row's answer, or the text of its right choice."""
    choices, place = row.extra.get("choices"), row.extra.get("answer")
    if choices and isinstance(place, int) and 0 <= place < len(choices):
        return str(choices[place])
    return row.turns[-1].shown


def _question_key(row: Conversation) -> str:
    """Return what rows with the same answers to choose from share: their choices, or their question."""
    choices = row.extra.get("choices")
    if choices:
        return "\0".join(sorted({normalise(str(choice)) for choice in choices}))
    return normalise(row.turns[-2].words) if len(row.turns) > 1 else ""


def _answer_key(row: Conversation) -> str:
    answer = given_answer(row)
    return normalise(answer) or answer.strip()


def few_answer_groups(rows: Sequence[Conversation], indices: Sequence[int]) -> list[list[int]]:
    """Group rows with one answer each by their question, and questions by their answers.

    Questions that share an answer are in one group; if it has too many answers, each question is a group.

    Args:
        rows: All rows.
        indices: The rows to group.

    Returns:
        Indices of each group with few answers.
    """
    single = [i for i in indices if sum(turn.role == "assistant" for turn in rows[i].turns) == 1]
    questions: dict[str, list[int]] = {}
    for i in single:
        questions.setdefault(_question_key(rows[i]), []).append(i)
    counts = {key: Counter(_answer_key(rows[i]) for i in mine) for key, mine in questions.items()}
    parent = {key: key for key in questions}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    first: dict[str, str] = {}
    for key, answers in counts.items():
        for answer in (answer for answer, count in answers.items() if count >= min(_SEEN, len(questions[key]))):
            parent[root(key)] = root(first.setdefault(answer, key))
    joined: dict[str, list[str]] = {}
    for key in questions:
        joined.setdefault(root(key), []).append(key)
    groups = []
    for keys in joined.values():
        together = sorted(i for key in keys for i in questions[key])
        alone = [questions[key] for key in keys]
        groups += [group for group in ([together] if _has_few(rows, together) else alone) if _has_few(rows, group)]
    return groups


def _has_few(rows: Sequence[Conversation], group: Sequence[int]) -> bool:
    counts = Counter(_answer_key(rows[i]) for i in group)
    few = [count for count in counts.values() if count >= _SEEN]
    return len(group) >= _LEAST_ROWS and 2 <= len(few) <= _MOST_ANSWERS and sum(few) >= _COVERED * len(group)


def _by_rows(rows: Sequence[Conversation], states: np.ndarray) -> list[Surprise]:
    keys = [_answer_key(row) for row in rows]
    counts = Counter(keys)
    few = [key for key, count in counts.items() if count >= _SEEN]
    shown = {key: Counter(given_answer(r) for r, k in zip(rows, keys, strict=True) if k == key) for key in few}
    given = np.array([few.index(key) if key in few else -1 for key in keys])
    same: dict[object, list[int]] = {}
    for place, row in enumerate(rows):
        if row.images:
            same.setdefault((row.images, tuple(turn.text for turn in row.turns[:-1])), []).append(place)
    scores = leave_out(states, given, len(few), [group for group in same.values() if 1 < len(group) <= _TOGETHER])
    own = np.where(given >= 0, scores[np.arange(len(rows)), given], 0.0)  # no other row has such an answer
    others = scores.copy()
    others[np.flatnonzero(given >= 0), given[given >= 0]] = -np.inf
    margins, best = others.max(axis=1) - own, others.argmax(axis=1)
    ranks = 1 + (others > own[:, None]).sum(axis=1)
    return [
        Surprise(BY_ROWS, float(margin), int(rank), shown[few[place]].most_common(1)[0][0])
        for margin, rank, place in zip(margins, ranks, best, strict=True)
    ]


def leave_out(
    states: np.ndarray, given: np.ndarray, answers: int, together: Sequence[Sequence[int]] = ()
) -> np.ndarray:
    """Predict each row's answer from all other rows.

    Ridge regression has its leave-one-out predictions in closed form: y - (y - y') / (1 - h), with y' the fit and h the
    leverage of the row (Allen, Technometrics 16, 1974); for rows that are left out together, 1 - h is the matrix
    I - H of these rows. The penalty is the one of the smallest error.

    Args:
        states: Shape (rows, hidden size).
        given: Number of each row's answer, or -1 for another; int of shape (rows,).
        answers: Number of answers.
        together: Rows that are left out together; a row is in one such group at most.

    Returns:
        Scores of shape (rows, answers); the answer of a sound row has about 1, the others 0.
    """
    inputs = states.astype(np.float64)
    inputs = (inputs - inputs.mean(axis=0)) / (inputs.std(axis=0) + 1e-6) / inputs.shape[1] ** 0.5
    inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    targets = (given[:, None] == np.arange(answers)).astype(np.float64)
    values, vectors = np.linalg.eigh(inputs.T @ inputs)
    kept = values > values.max() * 1e-12
    directions = inputs @ vectors[:, kept] / np.sqrt(values[kept])
    projected = directions.T @ targets
    best, least = targets, np.inf
    for penalty in _PENALTIES:
        shrunk = values[kept] / (values[kept] + penalty * len(inputs))
        leverage = np.minimum((directions**2) @ shrunk, 1 - 1e-9)[:, None]
        missed = targets - (directions * shrunk) @ projected
        predicted = targets - missed / (1 - leverage)
        for group in map(list, together):
            kernel = (directions[group] * shrunk) @ directions[group].T
            predicted[group] = targets[group] - np.linalg.lstsq(np.eye(len(group)) - kernel, missed[group])[0]
        error = float(((predicted - targets) ** 2).sum())
        if error < least:
            best, least = predicted, error
    return best


def _robust_z(values: np.ndarray) -> np.ndarray:
    """Return values as distances from their median, in robust standard deviations."""
    if not len(values):
        return values
    middle = np.median(values)
    spread = _TO_SIGMA * np.median(np.abs(values - middle))
    return np.asarray((values - middle) / max(float(spread), 1e-3))
