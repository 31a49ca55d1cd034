"""The runs of a sweep: every combination of the listed values with every seed, each with a folder of its own."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.recipe import Recipe, load_recipe
from lora_llava.recipe.io import parse_yaml
from lora_llava.recipe.mistakes import write_value

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(:log)?")
_LONGEST = 100
"""Most characters of a folder's name; a longer one ends in a hash."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: Name of its folder, which says the values.
        setting: The swept keys with their values.
        seed: Its seed.
        recipe: Its recipe, which asks nothing of the test rows.
    """

    name: str
    setting: Mapping[str, Any]
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Attributes:
        folder: The folder of its runs.
        recipe: The recipe with the values that all runs share.
        runs: The runs, those of a setting one after the other.
    """

    folder: Path
    recipe: Recipe
    runs: Sequence[SweepRun]

    @property
    def settings(self) -> list[list[SweepRun]]:
        """The runs by setting; those of one differ in the seed."""
        return [list(runs) for _, runs in itertools.groupby(self.runs, key=lambda run: describe(run.setting))]


def describe(setting: Mapping[str, Any]) -> str:
    """Return a setting as it is typed: `training.learning_rate=0.0001 lora.r=8`."""
    return " ".join(f"{key}={write_value(value)}" for key, value in setting.items()) or "the recipe"


@dataclass(frozen=True)
class SweptValues:
    """What a sweep varies, before the settings are chosen.

    Attributes:
        source: The recipe, as in `load_recipe`.
        fixed: Overrides of all runs.
        swept: The values of each key that has several, or its range, as they were typed.
        seeds: The seeds of each setting.
        folder: The folder of the runs.
        recipe: The recipe with the values that all runs share.
    """

    source: str
    fixed: Sequence[str]
    swept: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    folder: Path
    recipe: Recipe

    def runs(self, texts: Mapping[str, str], prefix: str = "") -> list[SweepRun]:
        """Return the runs of one setting.

        Args:
            texts: The value of each swept key, as in an override.
            prefix: Start of the folders' names.

        Returns:
            A run for each seed.

        Raises:
            UserError: For values that the recipe refuses.
        """
        setting = {key: parse_yaml(text, f"override {key}={text}") for key, text in texts.items()}
        found = load_recipe(self.source, [*self.fixed, *(f"{key}={text}" for key, text in texts.items())])
        _check_validation(found)
        names = {seed: prefix + run_name(setting, seed) for seed in self.seeds}
        return [
            SweepRun(name, setting, seed, _for_sweep(found, seed, self.folder / name)) for seed, name in names.items()
        ]


def read_sweep(recipe: str, overrides: Iterable[str], seeds: int = 1, output: str | None = None) -> Sweep:
    """Read a sweep over every combination of the listed values.

    Args:
        recipe: The recipe, as in `load_recipe`.
        overrides: Texts `key.sub=value,value`; a value is written as in an override of `finetune`. Commas inside
            quotes or brackets do not separate values.
        seeds: Number of seeds from the recipe's on.
        output: The folder of the runs; None is the recipe's `output_dir` with `-sweep`.

    Returns:
        The sweep.

    Raises:
        UserError: For a value that the recipe refuses, a value that is listed twice, a range, or a recipe without
            validation rows.
    """
    values = read_values(recipe, overrides, seeds, output)
    for key, (text, *_) in values.swept.items():
        if is_range(text):
            raise UserError(f"{key}={text} is a range; add --trials N to search it, or list values: {key}=VALUE,VALUE")
    runs: list[SweepRun] = []
    for texts in itertools.product(*values.swept.values()):
        runs += values.runs(dict(zip(values.swept, texts, strict=True)))
    return Sweep(values.folder, values.recipe, with_own_names(runs, values.folder))


def read_values(recipe: str, overrides: Iterable[str], seeds: int = 1, output: str | None = None) -> SweptValues:
    """Read what a sweep varies; arguments and errors are those of `read_sweep`, which refuses ranges too."""
    lists = [_values(override) for override in overrides]
    twice = [key for key, count in Counter(key for key, _ in lists).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice; list its values once: {twice[0]}=VALUE,VALUE")
    swept = {key: values for key, values in lists if len(values) > 1 or is_range(values[0])}
    fixed = [f"{key}={values[0]}" for key, values in lists if key not in swept]
    if "output_dir" in swept:
        raise UserError("output_dir cannot be swept: each run has a folder of its own; set --output FOLDER")
    shared = load_recipe(recipe, fixed)
    _check_validation(shared)
    numbers: Sequence[int] = range(shared.seed, shared.seed + seeds)
    if "seed" in swept:
        if seeds > 1:
            raise UserError("seed has several values and --seeds is set; drop one")
        numbers = [load_recipe(recipe, [*fixed, f"seed={text}"]).seed for text in swept.pop("seed")]
    return SweptValues(recipe, fixed, swept, numbers, Path(output or f"{shared.output_dir}-sweep"), shared)


def is_range(text: str) -> bool:
    """Whether a value is a range of numbers: `1e-5..1e-3`, or `1e-5..1e-3:log` by the logarithm."""
    return RANGE.fullmatch(text) is not None


def _values(override: str) -> tuple[str, list[str]]:
    key, equals, text = override.partition("=")
    values = split_values(text) if equals else [text]
    if equals and len(values) > 1 and not all(values):
        raise UserError(f"override {override!r}: a value between its commas is empty; remove a comma")
    if not equals or not key:
        raise UserError(f"override {override!r}: write key.sub=value,value")
    if len(values) > 1 and any(map(is_range, values)):
        raise UserError(f"override {override!r}: a range is given alone; write {key}=LOW..HIGH, or list values")
    parsed = [json.dumps(parse_yaml(value, f"override {override!r}"), sort_keys=True, default=str) for value in values]
    for number, value in enumerate(parsed):
        if value in parsed[:number]:
            raise UserError(f"override {override!r}: the value {values[number]} is listed twice; keep one")
    return key, values


def split_values(text: str) -> list[str]:
    """Split a text at its commas, except those inside quotes or brackets.

    Args:
        text: Such as `[q_proj, v_proj],[q_proj]`.

    Returns:
        The values without spaces around them.
    """
    parts, depth, quote, before = [""], 0, "", ","
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and before in ",[{:":  # an apostrophe inside a word is none
            quote = character
        depth += (not quote) * ((character in "[{") - (character in "]}"))
        if character == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
        before = before if character.isspace() else character
    return [part.strip() for part in parts]


def _check_validation(recipe: Recipe) -> None:
    data = recipe.data
    has_split = data.format == "scienceqa" and data.splits.validation is not None
    if not (has_split or data.validation_rows or data.validation_source):
        raise UserError("a sweep chooses by the validation loss and needs validation rows; set data.validation_rows=20")


def _for_sweep(recipe: Recipe, seed: int, folder: Path) -> Recipe:
    """Return the recipe of one run: the test rows stay unread, and are asked once, for the chosen run."""
    evaluation = recipe.evaluation
    if evaluation is not None:
        evaluation = evaluation.model_copy(update={"before": 0, "after": 0})
    return recipe.model_copy(update={"seed": seed, "output_dir": str(folder), "evaluation": evaluation})


def run_name(setting: Mapping[str, Any], seed: int) -> str:
    """Return a folder's name that says the values, such as `learning_rate-0.0001_r-8_seed-0`."""
    last = Counter(key.rpartition(".")[2] for key in setting)
    keys = {key: short if last[short := key.rpartition(".")[2]] == 1 else key for key in setting}
    parts = [f"{keys[key]}-{_value_name(value)}" for key, value in setting.items()]
    return "_".join([*parts, f"seed-{seed}"])


def _value_name(value: Any) -> str:
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    if isinstance(value, list):
        return "+".join(map(_value_name, value)) or "none"
    return re.sub(r"[^\w.+-]+", "-", value if isinstance(value, str) else json.dumps(value)).strip("-") or "empty"


def with_own_names(runs: list[SweepRun], folder: Path) -> list[SweepRun]:
    """Add a hash of the setting to names that are too long or that another run has too, in upper or lower case."""
    count = Counter(run.name.lower() for run in runs)
    named = []
    for run in runs:
        name = run.name
        if count[name.lower()] > 1 or len(name) > _LONGEST:
            digest = hashlib.sha256(describe(run.setting).encode()).hexdigest()[:8]
            end = f"_{digest}_seed-{run.seed}"
            name = name.removesuffix(f"_seed-{run.seed}")[: _LONGEST - len(end)] + end
        recipe = run.recipe.model_copy(update={"output_dir": str(folder / name)})
        named.append(SweepRun(name, run.setting, run.seed, recipe))
    return named
