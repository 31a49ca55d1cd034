"""Compare runs: averages over seeds, and McNemar's test on the same questions."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy.stats import binomtest

from lora_llava.evaluation.answer_metrics import EXACT, text_metrics
from lora_llava.evaluation.compare.compare_files import SCIENCEQA, ComparedRun, Row
from lora_llava.evaluation.compare.compare_questions import Key, same_questions
from lora_llava.evaluation.parsing.intervals import share_interval
from lora_llava.evaluation.scienceqa import score

_STAGE1 = ("model.start_from.stage1_run", "model.start_from.stage1_recipe")


@dataclass(frozen=True)
class Group:
    """One run, or the seeds of one recipe.

    Attributes:
        name: The name of the run, or the common part of several names.
        runs: One run per seed.
        settings: The recipe's values in which the groups differ, by `key.sub`.
        columns: Percentages by column, one per run; None if a run has no question in the column.
    """

    name: str
    runs: tuple[ComparedRun, ...]
    settings: dict[str, Any]
    columns: dict[str, list[float | None]]

    def mean(self, column: str) -> float | None:
        """Return the mean over the seeds."""
        values = [value for value in self.columns.get(column, []) if value is not None]
        return statistics.fmean(values) if values else None

    def deviation(self, column: str) -> float | None:
        """Return the sample standard deviation over the seeds (n - 1); None for one run."""
        values = [value for value in self.columns.get(column, []) if value is not None]
        return statistics.stdev(values) if len(values) > 1 else None

    def interval(self) -> tuple[float, float] | None:
        """Return the 95% interval of the first column; None for several runs."""
        if len(self.runs) > 1:
            return None
        rows = self.runs[0].rows
        return share_interval(sum(map(is_right, rows)), len(rows))


@dataclass(frozen=True)
class Discordance:
    """McNemar's test of two runs on the same questions.

    Attributes:
        first: Name of the first group.
        other: Name of the other group.
        seeds: Seeds of the two runs; None without a recipe.
        questions: Number of questions that both answered.
        only_first: Number that only the first run answered right.
        only_other: Number that only the other run answered right.
        p: p value of the exact McNemar test.
        holm: p value corrected for the number of tests (Holm).
    """

    first: str
    other: str
    seeds: tuple[int | None, int | None]
    questions: int
    only_first: int
    only_other: int
    p: float
    holm: float = 1.0

    @property
    def difference(self) -> float:
        """Return other minus first in the first column, in percentage points."""
        return 100 * (self.only_other - self.only_first) / self.questions


@dataclass(frozen=True)
class Comparison:
    """The comparison of all groups.

    Attributes:
        kind: `scienceqa` or `conversations`.
        columns: Names of the columns; the first one is tested.
        groups: The groups, in the order of their first runs.
        tests: Tests of every other group against the first.
        notes: Remarks for the reader.
    """

    kind: str
    columns: list[str]
    groups: list[Group]
    tests: list[Discordance]
    notes: list[str]

    @property
    def questions(self) -> list[int]:
        """Return the different numbers of questions that the runs answered, sorted."""
        return sorted({len(run.rows) for group in self.groups for run in group.runs})


def compare_runs(runs: Sequence[ComparedRun], common: bool = False) -> Comparison:
    """Compare runs on the same questions.

    Args:
        runs: From `read_runs`.
        common: Compare only the questions that all runs have.

    Returns:
        The comparison; for its groups see `group_runs`.

    Raises:
        UserError: If the runs have different questions, or different right answers to the same question.
    """
    groups, notes = group_runs(runs)
    keyed, question_notes = same_questions(runs, [{run.seed for run in group.runs} for group in groups], common)
    matched = {run.name: replace(run, rows=list(rows.values())) for run, rows in zip(runs, keyed, strict=True)}
    groups = [_with_columns(replace(group, runs=tuple(matched[run.name] for run in group.runs))) for group in groups]
    rows_of = {run.name: rows for run, rows in zip(runs, keyed, strict=True)}
    tests: list[Discordance] = []
    for other in groups[1:]:
        pairs = pair_runs(groups[0], other)
        notes += _unpaired(groups[0], other, pairs)
        tests += [_discordance(groups[0], other, pair, rows_of) for pair in pairs]
    corrected = holm([test.p for test in tests])
    tests = [replace(test, holm=p) for test, p in zip(tests, corrected, strict=True)]
    columns = list(dict.fromkeys(column for group in groups for column in group.columns))
    return Comparison(runs[0].kind, columns, groups, tests, [*question_notes, *notes])


def is_right(row: Row) -> bool:
    """Check whether an answer counts as right in the first column."""
    return bool(row[EXACT]) if EXACT in row else row["prediction"] == row["answer"]


def run_columns(kind: str, rows: Sequence[Row]) -> dict[str, float | None]:
    """Return the percentages of a run: ScienceQA's nine columns, or each of `text_metrics` that every row has."""
    if kind == SCIENCEQA:
        table = score(rows)  # type: ignore[arg-type]
        counted = {column: value for column, value in table.items() if isinstance(value, list)}
        return {column: 100 * right / count if count else None for column, (_, right, count) in counted.items()}
    return {
        metric.title: metric.scale * statistics.fmean(row[metric.key] for row in rows)
        for metric in text_metrics()
        if all(metric.is_valid(row.get(metric.key)) for row in rows)
    }


def group_runs(runs: Sequence[ComparedRun]) -> tuple[list[Group], list[str]]:
    """Group the runs of one recipe with different seeds.

    Args:
        runs: From `read_runs`.

    Returns:
        The groups without columns, in the order of their first runs, and notes. Runs whose recipes differ only in
        `seed` and `output_dir` form one group, also if each seed has its own Stage 1 run. A second run with the same
        recipe and seed forms its own group, as does a run without a recipe.
    """
    notes = []
    members: dict[tuple[str, ...], list[ComparedRun]] = {}
    for run in runs:
        key = _group_key(run, runs)
        twin = next((other for other in members.get(key, []) if other.seed == run.seed), None)
        if twin is not None:
            notes.append(f"{run.name} has the same recipe and seed as {twin.name}, so it is a group of its own")
            key = (run.name,)
        members.setdefault(key, []).append(run)
    found = list(members.values())
    settings = [_shared_settings(mine) for mine in found]
    different = _different_keys([own for own in settings if own is not None])
    groups = []
    for mine, shared in zip(found, settings, strict=True):
        own = shared or {}
        groups.append(Group(_group_name(mine), tuple(mine), {key: own[key] for key in different if key in own}, {}))
        if len(stage1 := list(dict.fromkeys(map(_stage1, mine)))) > 1:
            notes.append(f"{groups[-1].name}: the runs start from different Stage 1 runs: {', '.join(stage1)}")
    return groups, notes


def _group_key(run: ComparedRun, runs: Sequence[ComparedRun]) -> tuple[str, ...]:
    """Return what the seeds of one recipe share.

    It includes the name of the Stage 1 run without its seed only if runs with one seed start from several Stage 1 runs:
    then the Stage 1 runs are what is compared.
    """
    recipe = _without_stage1(run)
    if recipe is None:
        return (run.name,)
    alike = [other for other in runs if _without_stage1(other) == recipe]
    if len({other.seed for other in alike}) == len(alike):
        return (recipe,)
    return recipe, _without_seed(_stage1(run), run.seed)


def _without_stage1(run: ComparedRun) -> str | None:
    if run.settings is None:
        return None
    return json.dumps({key: value for key, value in run.settings.items() if key not in _STAGE1}, sort_keys=True)


def _stage1(run: ComparedRun) -> str:
    return next((str(value) for key in _STAGE1 if (value := (run.settings or {}).get(key)) is not None), "")


def _shared_settings(runs: Sequence[ComparedRun]) -> dict[str, Any] | None:
    """Return the values of the recipe that all runs of a group share; None without a recipe."""
    if runs[0].settings is None:
        return None
    own = len(set(map(_stage1, runs))) > 1
    return {key: value for key, value in runs[0].settings.items() if not (own and key in _STAGE1)}


def _different_keys(recipes: Sequence[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if any(recipe.get(key, ...) != recipes[0].get(key, ...) for recipe in recipes)]


def _without_seed(name: str, seed: int | None) -> str:
    return re.sub(rf"[-_./](seed|s)?[-_=]?{seed}$", "", name, flags=re.IGNORECASE)


def _group_name(runs: Sequence[ComparedRun]) -> str:
    """Return the names without the seed at their end if that leaves one name, otherwise all names."""
    if len(runs) == 1:
        return runs[0].name
    bare = {_without_seed(run.name, run.seed) for run in runs}
    return bare.pop() if len(bare) == 1 else ", ".join(run.name for run in runs)


def _with_columns(group: Group) -> Group:
    found = [run_columns(run.kind, run.rows) for run in group.runs]
    names = dict.fromkeys(name for columns in found for name in columns)
    return replace(group, columns={name: [columns.get(name) for columns in found] for name in names})


def pair_runs(first: Group, other: Group) -> list[tuple[ComparedRun, ComparedRun]]:
    """Pair the runs to test against each other.

    Args:
        first: A group.
        other: Another group.

    Returns:
        The runs with the same seed. If no seed is shared and one group is a single run, that run with each of the other
        group.
    """
    pairs = [(a, b) for a in first.runs for b in other.runs if a.seed is not None and a.seed == b.seed]
    if not pairs and 1 in (len(first.runs), len(other.runs)):
        pairs = [(a, b) for a in first.runs for b in other.runs]
    return pairs


def _unpaired(first: Group, other: Group, pairs: Sequence[tuple[ComparedRun, ComparedRun]]) -> list[str]:
    """Return a note about the runs that no test includes."""
    if not pairs:
        return [f"no test of {other.name} against {first.name}: they share no seed"]
    tested = {run.name for pair in pairs for run in pair}
    alone = [run.name for run in (*first.runs, *other.runs) if run.name not in tested]
    if not alone:
        return []
    return [f"{other.name} against {first.name}: no test of {', '.join(alone)}, the seed is not in both groups"]


def _discordance(
    first: Group, other: Group, pair: tuple[ComparedRun, ComparedRun], rows_of: dict[str, dict[Key, Row]]
) -> Discordance:
    ours, theirs = (rows_of[run.name] for run in pair)
    counts = Counter((is_right(ours[key]), is_right(theirs[key])) for key in ours)
    only_first, only_other = counts[True, False], counts[False, True]
    return Discordance(
        first.name,
        other.name,
        (pair[0].seed, pair[1].seed),
        len(ours),
        only_first,
        only_other,
        mcnemar(only_first, only_other),
    )


def mcnemar(only_first: int, only_other: int) -> float:
    """Run McNemar's exact test (Psychometrika 12, 1947) on the questions that only one of two models answers right.

    Dietterich (Neural Computation 10:7, 1998) recommends it for two models that were trained once.

    Args:
        only_first: Number of questions that only the first model answers right.
        only_other: Number that only the second model answers right.

    Returns:
        The two-sided p value of a binomial test with probability 1/2.
    """
    if only_first + only_other == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_other).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Apply Holm's correction for several tests (Scandinavian Journal of Statistics 6, 1979).

    Args:
        values: The p values of the tests.

    Returns:
        The corrected p values, in the same order.
    """
    corrected = [1.0] * len(values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = highest
    return corrected
