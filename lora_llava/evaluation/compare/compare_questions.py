"""The same questions of runs that are compared: ids that are missing or stand twice, and other data, are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.evaluation.compare.compare_files import CONVERSATIONS, Row, Run

Key = tuple[Any, ...]
"""What tells a question from the others."""
_NAMED = 3
"""Questions that a message names of those it counts."""


def same_questions(
    runs: Sequence[Run], seeds: Sequence[Set[int | None]], common: bool
) -> tuple[list[dict[Key, Row]], list[str]]:
    """Put the runs' answers to one question under one key.

    Args:
        runs: From `read_runs`.
        seeds: Those of each group of runs.
        common: Take the questions that all runs have, and each once.

    Returns:
        Each run's rows by question, in one order, and what is to be said of them. Without `common` all runs have the
        same, or all groups the same seeds and the runs of each seed the same: rows that are held back are drawn by it.

    Raises:
        UserError: For questions that a run lacks, or whose right answer is not the same in all; for one of ScienceQA
            that a run has twice.
    """
    keys = _keys(runs)
    counts = [Counter(mine) for mine in keys]
    every = list(dict.fromkeys(key for mine in keys for key in mine))
    uneven = _uneven(keys) if runs[0].kind == CONVERSATIONS else set()
    usable = [key for key in every if all(count[key] == 1 for count in counts) and key[:-1] not in uneven]
    notes: list[str] = []
    wanted = [usable] * len(runs)
    if common and not usable:
        raise UserError("--common: no question is in every run once; evaluate them on the same rows")
    if common and len(usable) < len(every):
        left = len(every) - len(usable)
        notes = [f"{left:,} of {len(every):,} questions left out: not in every run, or more often in one"]
    elif not common:
        _refuse_doubles(runs, counts)
        if len(usable) < len(every):
            _refuse_missing(runs, seeds, counts, every)
            notes = ["every seed was asked questions of its own, runs of one seed the same"]
            wanted = keys
    found = [dict(zip(mine, run.rows, strict=True)) for run, mine in zip(runs, keys, strict=True)]
    keyed = [{key: rows[key] for key in mine} for rows, mine in zip(found, wanted, strict=True)]
    _check_answers(runs, keyed)
    return keyed, [*notes, *_copies(runs, keyed), *_parsers(runs)]


def _parsers(runs: Sequence[Run]) -> list[str]:
    """Which runs' letters were read by another parser than LLaVA's."""
    names = [run.name for run in runs if any("parser" in row for row in run.rows)]
    return [f"letters read by the lenient parser, not by LLaVA's rule: {', '.join(names)}"] if names else []


def _keys(runs: Sequence[Run]) -> list[list[Key]]:
    """What tells each row from the others: ScienceQA's id; of a person's own data, where ids may repeat, the id, the
    question, the reference, the source where there are several, and last which copy of the same row it is."""
    several = any(len({row.get("source") for row in run.rows}) > 1 for run in runs)  # else the file may be renamed
    keys: list[list[Key]] = []
    for run in runs:
        mine: list[Key] = []
        seen: Counter[Key] = Counter()
        for row in run.rows:
            key: Key = (row["question_id"],)
            if run.kind == CONVERSATIONS:
                key = (*key, row["question"], row["reference"], *([row.get("source")] if several else []))
                seen[key] += 1
                key = (*key, seen[key])
            mine.append(key)
        keys.append(mine)
    return keys


def _uneven(keys: Sequence[Sequence[Key]]) -> set[Key]:
    """Rows that not all runs have as many copies of: which copy is which cannot be told."""
    copies = [Counter(key[:-1] for key in mine) for mine in keys]
    return {key for mine in copies for key, count in mine.items() if any(other[key] != count for other in copies)}


def _copies(runs: Sequence[Run], keyed: Sequence[dict[Key, Row]]) -> list[str]:
    """What is said of rows of a person's own data that stand there more than once."""
    more = {key[:-1] for mine in keyed for key in mine if key[-1] == 2} if runs[0].kind == CONVERSATIONS else set()
    if not more:
        return []
    what = "1 row stands" if len(more) == 1 else f"{len(more):,} rows stand"
    return [f"{what} in the data more than once ({_named(list(more))}); the copies are paired in their order"]


def _named(keys: Sequence[Key]) -> str:
    ids = list(dict.fromkeys(str(key[0]) for key in keys))
    return ", ".join(ids[:_NAMED]) + (", …" if len(ids) > _NAMED else "")


def _refuse_doubles(runs: Sequence[Run], counts: Sequence[Counter[Key]]) -> None:
    lines = []
    for run, count in zip(runs, counts, strict=True):
        twice = [key for key, times in count.items() if times > 1]
        if twice:
            lines.append(
                f"{run.file}: answered more than once: {len(twice):,} of {len(count):,} questions, {_named(twice)}; "
                "keep one answer, or leave these questions out with --common"
            )
    if lines:
        raise UserError("\n".join(lines))


def _refuse_missing(
    runs: Sequence[Run], seeds: Sequence[Set[int | None]], counts: Sequence[Counter[Key]], every: Sequence[Key]
) -> None:
    asked: dict[int | None, set[frozenset[Key]]] = {}
    for run, count in zip(runs, counts, strict=True):
        asked.setdefault(run.seed, set()).add(frozenset(count))
    by_seed = None not in asked and all(len(sets) == 1 for sets in asked.values())
    if by_seed and all(mine == seeds[0] for mine in seeds):
        return
    lines = []
    for run, count in zip(runs, counts, strict=True):
        missing = [key for key in every if key not in count]
        if missing:
            lines.append(
                f"{run.file}: no answer to {len(missing):,} of {len(every):,} questions, {_named(missing)}; evaluate "
                "it on the same, or compare what all have with --common"
            )
    raise UserError("\n".join(lines))


def _check_answers(runs: Sequence[Run], keyed: Sequence[dict[Key, Row]]) -> None:
    """Hold that one question has one right answer: an id may name another question in other data."""
    if runs[0].kind == CONVERSATIONS:
        return  # the reference is part of what tells a question from another
    known: dict[Key, tuple[Run, int]] = {}
    for run, rows in zip(runs, keyed, strict=True):
        for key, row in rows.items():
            other, answer = known.setdefault(key, (run, row["answer"]))
            if answer != row["answer"]:
                raise UserError(
                    f"{run.file}: the right answer to question {key[0]} is {row['answer']}, in {other.file} it is "
                    f"{answer}; they were asked different data, evaluate them on the same"
                )
