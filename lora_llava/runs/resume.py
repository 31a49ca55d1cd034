"""What a run goes on from, and whether it is still the same run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from lora_llava.core.errors import UserError, nearest
from lora_llava.recipe import Recipe, load_recipe
from lora_llava.runs.checkpoint import best_of_run, list_checkpoints, newest_complete, read_manifest
from lora_llava.runs.directory import RECIPE_FILE
from lora_llava.runs.identity import check_identity, is_of_run
from lora_llava.splits.split_rows import Split

UNTOUCHED = frozenset(
    {
        "output_dir",
        "training.report_to",
        "training.workers",
        "training.log_every",
        "training.save_every",
        "training.memory_gb",
        "training.gradient_checkpointing",
    }
)
"""Keys that change nothing of what is trained or asked."""
_PLACES_OF_A_SOURCE = ("path", "file", "revision", "image_folder")
PLACES = frozenset(
    {
        "model.llm",
        "model.llm_revision",
        "model.vision_tower",
        "model.vision_tower_revision",
        *(
            f"model.start_from.{name}"
            for name in (
                "stage1_run",
                "stage1_recipe",
                "projector",
                "projector_revision",
                "llava",
                "llava_revision",
            )
        ),
        *(f"data.{name}" for name in _PLACES_OF_A_SOURCE),
        *(f"data.{held}_source.{name}" for held in ("validation", "test") for name in _PLACES_OF_A_SOURCE),
    }
)
"""Keys that say where something is found: `identity` compares what is found there, so that it may be moved."""
ACCEPTABLE = frozenset(
    {
        "training.epochs",
        "training.max_steps",
        "training.learning_rate",
        "training.projector_learning_rate",
        "training.weight_decay",
        "training.warmup_ratio",
        "training.lr_scheduler",
        "training.max_grad_norm",
        "training.projector_dropout",
        "training.eval_every",
        "training.vision_cache",
        "lora.dropout",
    }
)
"""Keys that may change on the way, where the person says so, beside all of `evaluation`: with another of those, the
table before training is asked again. All others change what a step or the model is."""


@dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes:
        checkpoint: The newest that is whole.
        step: Its optimiser step.
        changed: Keys of the recipe that were accepted to be others than before.
        told: Lines for the person: what was passed over and why, and what was taken.
        moved: Lines for the person, where `same_run` holds: what is found at another place than before.
    """

    checkpoint: Path
    step: int
    changed: tuple[str, ...]
    told: tuple[str, ...]
    moved: tuple[str, ...] = ()


def find_start(folder: Path, recipe: Recipe, accepted: Iterable[str] = (), processes: int = 1) -> Start:
    """Find the newest whole checkpoint and compare the recipe with its own; `same_run` compares what the recipe names.

    Args:
        folder: Where the checkpoints are.
        recipe: As it is now.
        accepted: Keys that may have changed.
        processes: That train together now.

    Returns:
        Where to go on.

    Raises:
        UserError: Where there is none, or something changed that was not accepted.
    """
    checkpoint, passed_over = newest_complete(folder)
    if checkpoint is None:
        if passed_over:
            raise UserError(f"--resume: no checkpoint is whole ({'; '.join(passed_over)}); run with --overwrite")
        raise UserError(f"--resume: {folder} holds no checkpoint; run without it")
    manifest = read_manifest(checkpoint)
    step, before = int(manifest["step"]), manifest.get("processes", 1)
    if before != processes:
        raise UserError(
            f"--resume: {checkpoint} was written by {before} processes that trained together, and now there are "
            f"{processes}; start as many, or run with --overwrite"
        )
    begun = load_recipe(checkpoint / RECIPE_FILE)
    changed = check_changes(begun, recipe, accepted, step)
    told = [f"passed over {each}; it is kept as damaged-{each.partition(':')[0]}" for each in passed_over]
    accepted_told = f", with another {', '.join(changed)}" if changed else ""
    told += [f"going on from {checkpoint} at step {step}{accepted_told}"]
    return Start(checkpoint, step, changed, tuple(told), tuple(moved_places(begun, recipe)))


def same_run(start: Start, identity: dict[str, Any], splits: Mapping[str, Split]) -> tuple[dict[str, Any], list[str]]:
    """Refuse to go on with a run of other content, or without its best checkpoint.

    Args:
        start: From `find_start`.
        identity: From `run_identity`: what stands there now.
        splits: The run's, to name the rows and images that changed.

    Returns:
        The identity under the run's own name, and lines for the person.

    Raises:
        UserError: Where something is not what it was, or the best checkpoint is missing, damaged or another run's.
    """
    name, told = check_identity(start.checkpoint, identity, splits)
    state = json.loads((start.checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    if best := state.get("best_global_step"):
        best_of_run(start.checkpoint.parent, int(best), lambda each: is_of_run(each, name))
    return {**identity, "run": name}, [*start.moved, *told]


def moved_places(before: Recipe, now: Recipe) -> list[str]:
    """What a recipe finds elsewhere than before, a line for each key."""
    old, new = leaves(before), leaves(now)
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    lines = [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}, with the same content" for key in keys if key in PLACES
    ]
    if "data.sources" in keys and _settings_of(old["data.sources"]) == _settings_of(new["data.sources"]):
        lines.append("data.sources are elsewhere than before, with the same content")
    return lines


def _settings_of(sources: Any) -> Any:
    """What sources say of themselves, without where they are."""
    if not isinstance(sources, list | tuple):
        return sources
    return [{key: value for key, value in each.items() if key not in _PLACES_OF_A_SOURCE} for each in sources]


def check_changes(before: Recipe, now: Recipe, accepted: Iterable[str], step: int) -> tuple[str, ...]:
    """Refuse a recipe that is another than the one a run was started with.

    Args:
        before: The checkpoint's.
        now: The one to go on with.
        accepted: Keys that may have changed.
        step: The checkpoint's, for the message.

    Returns:
        The accepted keys that did change.

    Raises:
        UserError: Naming every other changed key with both values; or an accepted key that cannot be.
    """
    accepted = tuple(accepted)
    for key in accepted:
        if not _acceptable(key):
            hint = nearest(key, ACCEPTABLE) or f"; these can: {', '.join(sorted(ACCEPTABLE))}"
            raise UserError(f"--accept-changes: {key} cannot change within a run{hint}")
    old, new = leaves(before), leaves(now)
    changed = [key for key in sorted(old.keys() | new.keys()) if _is_other(key, old.get(key), new.get(key))]
    refused = [key for key in changed if key not in accepted and not (_is_asked(key) and "evaluation" in accepted)]
    if refused:
        told = "; ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in refused)
        able = [key for key in refused if _acceptable(key)]
        asked = [key for key in able if _is_asked(key)]
        named = [key for key in able if key not in asked] + (
            asked if len(asked) == 1 else ["evaluation"] if asked else []
        )
        mend = f", or --accept-changes {','.join(named)}" if able == refused else ", or run with --overwrite"
        raise UserError(f"--resume: the recipe is not that of step {step}: {told}; take that back{mend}")
    return tuple(changed)


def _is_other(key: str, before: Any, now: Any) -> bool:
    """Whether a key's value changes the run by itself."""
    if key == "data.sources":
        before, now = _settings_of(before), _settings_of(now)
    return before != now and key not in UNTOUCHED | PLACES


def _is_asked(key: str) -> bool:
    return key == "evaluation" or key.startswith("evaluation.")


def _acceptable(key: str) -> bool:
    return key in ACCEPTABLE or _is_asked(key)


def leaves(recipe: Recipe) -> dict[str, Any]:
    """A recipe's values by their dotted keys; a list is one value."""
    found: dict[str, Any] = {}

    def walk(content: dict[str, Any], prefix: str) -> None:
        for key, value in content.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value

    walk(recipe.model_dump(), "")
    return found


def refuse_unfinished(folder: Path) -> None:
    """Refuse to start anew where a run was left in the middle.

    Args:
        folder: Where its checkpoints are.

    Raises:
        UserError: Where there are any.
    """
    found = list_checkpoints(folder)
    if found:
        raise UserError(
            f"output_dir: {folder.parent} holds an unfinished run, with {found[0].name}; go on with --resume, start "
            "anew with --overwrite, or set output_dir=OTHER"
        )
