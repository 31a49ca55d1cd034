"""Match the questions of the runs to compare; report missing ids, duplicate ids and different data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.evaluation.compare.compare_files import CONVERSATIONS, ComparedRun, Row

Key = tuple[Any, ...]
"""Identifies a question among all others."""
_NAMED = 3
"""Most question ids that a message lists."""


def same_questions(
    runs: Sequence[ComparedRun], seeds: Sequence[Set[int | None]], common: bool
) -> tuple[list[dict[Key, Row]], list[str]]:
    """Match the answers of the runs by question.

    Args:
        runs: From `read_runs`.
        seeds: The seeds of each group of runs.
        common: Whether to keep only the questions that every run has exactly once.

    Returns:
        The rows of each run by question, in the same order, and notes about them. Without `common`, either all runs
        have the same questions, or all groups have the same seeds and the runs of each seed the same questions, since
        the seed draws the held-out rows.

    Raises:
        UserError: If a run lacks questions, has a ScienceQA question twice, or has a different right answer to one.
    """
    keys = _keys(runs)
    counts = [Counter(mine) for mine in keys]
    every = list(dict.fromkeys(key for mine in keys for key in mine))
    uneven = _uneven(keys) if runs[0].kind == CONVERSATIONS else set()
    usable = [key for key in every if all(count[key] == 1 for count in counts) and key[:-1] not in uneven]
    notes: list[str] = []
    wanted = [usable] * len(runs)
    if common and not usable:
        raise UserError("--common: no question is in every run exactly once; evaluate the runs on the same rows")
    if common and len(usable) < len(every):
        left = len(every) - len(usable)
        notes = [f"{left:,} of {len(every):,} questions left out: missing from a run, or repeated in one"]
    elif not common:
        _refuse_doubles(runs, counts)
        if len(usable) < len(every):
            _refuse_missing(runs, seeds, counts, every)
            notes = ["each seed has its own questions; runs of one seed have the same questions"]
            wanted = keys
    found = [dict(zip(mine, run.rows, strict=True)) for run, mine in zip(runs, keys, strict=True)]
    keyed = [{key: rows[key] for key in mine} for rows, mine in zip(found, wanted, strict=True)]
    _check_answers(runs, keyed)
    return keyed, [*notes, *_copies(runs, keyed), *_parsers(runs)]


def _parsers(runs: Sequence[ComparedRun]) -> list[str]:
    """Return a note that names the runs whose letters were not parsed by LLaVA's rule."""
    names = [run.name for run in runs if any("parser" in row for row in run.rows)]
    return [f"letters read by the lenient parser instead of LLaVA's rule: {', '.join(names)}"] if names else []


def _keys(runs: Sequence[ComparedRun]) -> list[list[Key]]:
    """Return the key of each row of each run.

    For ScienceQA it is the id. In other data ids may repeat: the key is the id, the question, the reference, the source
    if there are several, and the number of the copy among equal rows.
    """
    several = any(
        len({row.get("source") for row in run.rows}) > 1 for run in runs
    )  # with one source, its name may differ between runs
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
    """Return the rows whose number of copies differs between runs, so that the copies cannot be matched."""
    copies = [Counter(key[:-1] for key in mine) for mine in keys]
    return {key for mine in copies for key, count in mine.items() if any(other[key] != count for other in copies)}


def _copies(runs: Sequence[ComparedRun], keyed: Sequence[dict[Key, Row]]) -> list[str]:
    """Return a note about rows that appear more than once in the data."""
    more = {key[:-1] for mine in keyed for key in mine if key[-1] == 2} if runs[0].kind == CONVERSATIONS else set()
    if not more:
        return []
    what = "1 row appears" if len(more) == 1 else f"{len(more):,} rows appear"
    return [f"{what} more than once in the data ({_named(list(more))}); copies are paired in order"]


def _named(keys: Sequence[Key]) -> str:
    ids = list(dict.fromkeys(str(key[0]) for key in keys))
    return ", ".join(ids[:_NAMED]) + (", …" if len(ids) > _NAMED else "")


def _refuse_doubles(runs: Sequence[ComparedRun], counts: Sequence[Counter[Key]]) -> None:
    lines = []
    for run, count in zip(runs, counts, strict=True):
        twice = [key for key, times in count.items() if times > 1]
        if twice:
            lines.append(
                f"{run.file}: {len(twice):,} of {len(count):,} questions answered more than once: {_named(twice)}; "
                "keep one answer, or leave these questions out with --common"
            )
    if lines:
        raise UserError("\n".join(lines))


def _refuse_missing(
    runs: Sequence[ComparedRun], seeds: Sequence[Set[int | None]], counts: Sequence[Counter[Key]], every: Sequence[Key]
) -> None:
    questions: dict[int | None, set[frozenset[Key]]] = {}
    for run, count in zip(runs, counts, strict=True):
        questions.setdefault(run.seed, set()).add(frozenset(count))
    by_seed = None not in questions and all(len(sets) == 1 for sets in questions.values())
    if by_seed and all(mine == seeds[0] for mine in seeds):
        return
    lines = []
    for run, count in zip(runs, counts, strict=True):
        missing = [key for key in every if key not in count]
        if missing:
            lines.append(
                f"{run.file}: no answer to {len(missing):,} of {len(every):,} questions: {_named(missing)}; "
                "evaluate the run on the same questions, or compare the common ones with --common"
            )
    raise UserError("\n".join(lines))


def _check_answers(runs: Sequence[ComparedRun], keyed: Sequence[dict[Key, Row]]) -> None:
    """Check that a question has the same right answer in all runs; an id may name another question in other data."""
    if runs[0].kind == CONVERSATIONS:
        return  # the reference is part of the key
    known: dict[Key, tuple[ComparedRun, int]] = {}
    for run, rows in zip(runs, keyed, strict=True):
        for key, row in rows.items():
            other, answer = known.setdefault(key, (run, row["answer"]))
            if answer != row["answer"]:
                raise UserError(
                    f"{run.file}: the right answer to question {key[0]} is {row['answer']}, in {other.file} it is "
                    f"{answer}; evaluate both runs on the same data"
                )
