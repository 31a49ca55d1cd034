"""A search instead of a grid: Optuna proposes one setting after another, and its trials are kept in the sweep's folder.

The sampler has the seed of the recipe plus the number of the trial, so that a search that was stopped resumes with the
trials that it would have had.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.recipe import recipe_hash
from lora_llava.recipe.io import parse_yaml
from lora_llava.training.sweep.grid import RANGE, SweepRun, SweptValues, is_range, read_values

TRIALS_FILE = "trials.log"
"""Optuna's journal of the trials, in the sweep's folder."""
_STUDY = "sweep"
_ASKED = "search"
"""Attribute of the study that says what is searched."""
_RANDOM = 5
"""Trials drawn at random before the sampler models the results. Optuna's default is 10, many for runs of hours."""
_REPEATS = 10
"""Proposals per trial until the search gives up finding settings that were not tried."""
_CORNERS = 64
"""Most settings of lowest and highest values that are checked before anything is trained."""


@dataclass(frozen=True)
class Search:
    """A search.

    Attributes:
        values: What is varied: lists of choices, and ranges.
        trials: Number of settings to try.
    """

    values: SweptValues
    trials: int

    @property
    def folder(self) -> Path:
        return self.values.folder

    def corners(self) -> list[dict[str, str]]:
        """Settings of choices and of the lowest and highest values of ranges; the first and last are the extremes."""
        ends = [list(RANGE.fullmatch(texts[0]).groups()[:2]) if is_range(texts[0]) else texts for texts in self._texts]  # type: ignore[union-attr]
        found = [dict(zip(self.values.swept, texts, strict=True)) for texts in itertools.product(*ends)]
        return found if len(found) <= _CORNERS else [*found[: _CORNERS - 1], found[-1]]

    @property
    def _texts(self) -> list[Sequence[str]]:
        return list(self.values.swept.values())

    def describe(self) -> str:
        """Return what is searched, as it was typed."""
        return " ".join(f"{key}={','.join(texts)}" for key, texts in self.values.swept.items())


def read_search(
    recipe: str, overrides: Iterable[str], trials: int, seeds: int = 1, output: str | None = None
) -> Search:
    """Read a search.

    Args:
        recipe: The recipe, as in `load_recipe`.
        overrides: Texts `key.sub=value,value`, `key.sub=LOW..HIGH` or `key.sub=LOW..HIGH:log`. A range between whole
            numbers has whole numbers only.
        trials: Number of settings to try.
        seeds: Number of seeds of each setting, from the recipe's on.
        output: The folder of the runs; None is the recipe's `output_dir` with `-sweep`.

    Returns:
        The search.

    Raises:
        UserError: Without Optuna, and for values that cannot be searched or that the recipe refuses.
    """
    if find_spec("optuna") is None:
        raise UserError("--trials needs Optuna: pip install 'lora_llava[optuna]'; or list values and drop --trials")
    overrides = list(overrides)
    for override in overrides:
        if override.startswith("seed=") and is_range(override.partition("=")[2]):
            raise UserError("seed is not searched; set --seeds N for N seeds of each trial")
    search = Search(read_values(recipe, overrides, seeds, output), trials)
    swept = search.values.swept
    if not swept:
        raise UserError(
            "--trials needs values to choose from; add lora.r=8,16,32 or training.learning_rate=1e-5..1e-3:log"
        )
    for key, (text, *_) in swept.items():
        if is_range(text):
            _check_range(key, text)
    if not any(is_range(texts[0]) for texts in swept.values()):
        count = math.prod(map(len, swept.values()))
        if trials >= count:
            raise UserError(
                f"--trials {trials}: the lists have only {count} combinations; drop --trials to train all of them"
            )
    for corner in search.corners():
        search.values.runs(corner)
    return search


def _check_range(key: str, text: str) -> None:
    low, high, log = _bounds(text)
    if low >= high:
        raise UserError(f"{key}={text}: the range is empty; write the lower number first")
    if log and low <= 0:
        raise UserError(f"{key}={text}: a range by the logarithm starts above 0; raise {low} or drop :log")


def _bounds(text: str) -> tuple[Any, Any, bool]:
    """Return the lowest and the highest number of a range, both whole or both fractional, and whether by the log."""
    found = RANGE.fullmatch(text)
    assert found is not None
    low, high = (parse_yaml(found[place], f"range {text}") for place in (1, 2))
    if not (isinstance(low, int) and isinstance(high, int)):
        low, high = float(low), float(high)
    return low, high, bool(found[3])


class TrialBook:
    """The trials of a search, kept in a journal in the sweep's folder.

    Args:
        search: The search.
        by: What is optimised: `loss` or `score`, of the validation rows.

    Raises:
        UserError: If the folder has the trials of another search, or they cannot be read.
    """

    def __init__(self, search: Search, by: str) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.search, self._optuna = search, optuna
        self._space = {key: _distribution(optuna, texts) for key, texts in search.values.swept.items()}
        search.folder.mkdir(parents=True, exist_ok=True)
        file = search.folder / TRIALS_FILE
        backend = JournalFileBackend(str(file), lock_obj=JournalFileOpenLock(str(file)))  # links need rights on Windows
        try:
            self._study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                study_name=_STUDY,
                direction="minimize" if by == "loss" else "maximize",
                load_if_exists=True,
            )
            asked = self._study.user_attrs.get(_ASKED)
        except Exception as error:  # a damaged line raises whatever it happens to break
            raise UserError(
                f"{file} cannot be read ({type(error).__name__}: {error}); remove it: finished runs are kept"
            ) from None
        mine = {
            "range or list": search.describe(),
            "--by": by,
            "seeds": ", ".join(map(str, search.values.seeds)),
            "recipe": recipe_hash(search.values.recipe)[:8],
        }
        if asked is None:
            self._study.set_user_attr(_ASKED, mine)
        elif asked != mine:
            what = next(name for name in mine if asked.get(name) != mine[name])
            raise UserError(
                f"{search.folder} has a search with another {what}: {asked.get(what)}; set --output OTHER to search "
                f"with {mine[what]}"
            )

    def settings(self) -> Iterator[list[SweepRun]]:
        """Yield the runs of each setting, first those of kept trials; record its result before the next is taken."""
        for place in itertools.count():
            while place >= len(kept := self._kept()):
                proposed = sum(map(len, kept.values()))
                if place >= self.search.trials or proposed >= _REPEATS * self.search.trials:
                    return
                self._propose(proposed)
            yield self.search.values.runs(dict(list(kept)[place]), f"trial-{place + 1}_")

    def record(self, place: int, value: float) -> None:
        """Record the result of a setting, the mean over its seeds; `place` is its place among the settings."""
        for trial in list(self._kept().values())[place]:
            if not trial.state.is_finished():
                self._study.tell(trial.number, value)

    def _kept(self) -> dict[tuple[tuple[str, str], ...], list[Any]]:
        """Return the trials by setting; a setting may be proposed more than once."""
        found: dict[tuple[tuple[str, str], ...], list[Any]] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if set(trial.params) == set(self._space):  # else it was stopped while it was proposed
                found.setdefault(tuple((key, _text(trial.params[key])) for key in self._space), []).append(trial)
        return found

    def _propose(self, before: int) -> None:
        """Add a trial; a setting that has a result gets the same again."""
        seed = self.search.values.recipe.seed + before
        self._study.sampler = self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM)
        self._study.ask(self._space)
        for place, trials in enumerate(self._kept().values()):
            if trials[0].state.is_finished():
                self.record(place, trials[0].value)


def _distribution(optuna: Any, texts: Sequence[str]) -> Any:
    if not is_range(texts[0]):
        return optuna.distributions.CategoricalDistribution(texts)
    low, high, log = _bounds(texts[0])
    kind = optuna.distributions.IntDistribution if isinstance(low, int) else optuna.distributions.FloatDistribution
    return kind(low, high, log=log)


def _text(value: Any) -> str:
    """Return a proposed value as it is typed; a fraction with three digits, so that folders have short names."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
