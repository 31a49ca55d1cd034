"""Find the checkpoint to resume from, and check that it is the same run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from lora_llava.core.errors import UserError, nearest
from lora_llava.recipe import Recipe, load_recipe
from lora_llava.recipe.io import RECIPE_FILE
from lora_llava.recipe.schema import LINEARS
from lora_llava.runs.checkpoint import best_of_run, list_checkpoints, newest_complete, read_manifest
from lora_llava.runs.identity import check_identity, is_of_run, read_identity
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
        "training.share_images",
        "training.deterministic",
    }
)
"""Keys that affect neither training nor evaluation, or whose effect `identity` compares."""
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
                "run",
                "stage1_run",
                "stage1_recipe",
                "projector",
                "projector_revision",
                "llava",
                "llava_revision",
            )
        ),
        *(f"data.{name}" for name in _PLACES_OF_A_SOURCE),
        *(f"data.{split}_source.{name}" for split in ("validation", "test") for name in _PLACES_OF_A_SOURCE),
    }
)
"""Keys for paths and revisions: `identity` compares the contents, so the files may be moved."""
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
        "training.early_stopping",
        "training.early_stopping.patience",
        "training.early_stopping.min_delta",
        "training.vision_cache",
        "lora.dropout",
    }
)
"""Keys that may change with --accept-changes, besides all of `evaluation`, whose change repeats the evaluation before
training. All other keys change the steps or the model."""
_ASPECT = "data.image_aspect"


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run resumes from.

    Attributes:
        checkpoint: The newest complete one.
        step: Its optimizer step.
        changed: Keys of the recipe with an accepted change.
        lines: Lines to print: the damaged checkpoints that were skipped, and the one that is used.
        moved: Lines to print once `same_run` has passed: paths that changed.
    """

    checkpoint: Path
    step: int
    changed: tuple[str, ...]
    lines: tuple[str, ...]
    moved: tuple[str, ...] = ()


def find_start(folder: Path, recipe: Recipe, accepted: Iterable[str] = (), processes: int = 1) -> Start:
    """Find the newest complete checkpoint and check the recipe against its recipe; `same_run` checks the contents.

    Args:
        folder: The folder of checkpoints.
        recipe: The present recipe.
        accepted: Keys that may have changed.
        processes: The number of processes that train now.

    Returns:
        The checkpoint to resume from.

    Raises:
        UserError: If there is none, or a change was not accepted.
    """
    checkpoint, skipped = newest_complete(folder)
    if checkpoint is None:
        if skipped:
            raise UserError(f"--resume: no checkpoint is complete ({'; '.join(skipped)}); run with --overwrite")
        raise UserError(f"--resume: {folder} has no checkpoint; run without --resume")
    manifest = read_manifest(checkpoint)
    step, before = int(manifest["step"]), manifest.get("processes", 1)
    if before != processes:
        raise UserError(
            f"--resume: {checkpoint} was written by a run of {before} processes, and now there are {processes}; "
            "start as many, or run with --overwrite"
        )
    begun = load_recipe(checkpoint / RECIPE_FILE)
    changed = check_changes(begun, recipe, accepted, step)
    lines = [f"skipped {each}; it is kept as damaged-{each.partition(':')[0]}" for each in skipped]
    accepted_text = f", with another {', '.join(changed)}" if changed else ""
    lines += [f"from {checkpoint} at step {step}{accepted_text}"]
    return Start(checkpoint, step, changed, tuple(lines), tuple(moved_places(begun, recipe)))


def keep_order(recipe: Recipe, checkpoints: Path) -> Recipe:
    """Return the recipe without `training.share_images` if the run to resume shares none, as in early versions.

    Args:
        recipe: The present recipe.
        checkpoints: The folder of the run's checkpoints.
    """
    identities = (read_identity(checkpoint) for checkpoint in list_checkpoints(checkpoints))
    identity = next((found for found in identities if found is not None), None)
    if identity is None or identity.get("order"):
        return recipe
    training = recipe.training.model_copy(update={"share_images": "off"})
    return recipe.model_copy(update={"training": training})


def same_run(start: Start, identity: dict[str, Any], splits: Mapping[str, Split]) -> tuple[dict[str, Any], list[str]]:
    """Refuse to resume a run whose base or data changed, or whose best checkpoint is missing.

    Args:
        start: From `find_start`.
        identity: The present identity, from `run_identity`.
        splits: The run's splits, to name the rows and images that changed.

    Returns:
        The identity with the run's name, and lines to print.

    Raises:
        UserError: If something changed, or the best checkpoint is missing, damaged or of another run.
    """
    name, lines = check_identity(start.checkpoint, identity, splits)
    state = json.loads((start.checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    if best := state.get("best_global_step"):
        best_of_run(start.checkpoint.parent, int(best), lambda each: is_of_run(each, name))
    return {**identity, "run": name}, [*start.moved, *lines]


def moved_places(before: Recipe, now: Recipe) -> list[str]:
    """List the paths that changed in a recipe, a line for each key."""
    old, new = leaves(before), leaves(now)
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    lines = [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}, with the same content" for key in keys if key in PLACES
    ]
    if "data.sources" in keys and _settings_of(old["data.sources"]) == _settings_of(new["data.sources"]):
        lines.append("the paths of data.sources changed, with the same content")
    return lines


def _settings_of(sources: Any) -> Any:
    """Return the settings of sources without their paths."""
    if not isinstance(sources, list | tuple):
        return sources
    return [{key: value for key, value in each.items() if key not in _PLACES_OF_A_SOURCE} for each in sources]


def check_changes(before: Recipe, now: Recipe, accepted: Iterable[str], step: int) -> tuple[str, ...]:
    """Refuse a recipe that differs from the one a run was started with.

    Args:
        before: The checkpoint's recipe.
        now: The recipe to resume with.
        accepted: Keys that may have changed.
        step: The checkpoint's step, for the message.

    Returns:
        The keys that changed.

    Raises:
        UserError: Naming every changed key that was not accepted, with both values; or an accepted key that cannot
            change.
    """
    accepted = tuple(accepted)
    for key in accepted:
        if not _acceptable(key):
            hint = nearest(key, ACCEPTABLE) or f"; keys that can: {', '.join(sorted(ACCEPTABLE))}"
            raise UserError(f"--accept-changes: {key} cannot change within a run{hint}")
    old, new = leaves(before), leaves(now)
    if before.model.start_from.llava is None and now.model.start_from.llava is None:
        for values in (old, new):  # earlier recipes name the aspect that auto is for a LLaVA made of parts
            values[_ASPECT] = "pad" if values[_ASPECT] == "auto" else values[_ASPECT]
    changed = [key for key in sorted(old.keys() | new.keys()) if _is_change(key, old.get(key), new.get(key))]
    refused = [key for key in changed if key not in accepted and not (_is_evaluation(key) and "evaluation" in accepted)]
    if refused:
        changes = "; ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in refused)
        acceptable = [key for key in refused if _acceptable(key)]
        evaluation = [key for key in acceptable if _is_evaluation(key)]
        named = [key for key in acceptable if key not in evaluation] + (
            evaluation if len(evaluation) == 1 else ["evaluation"] if evaluation else []
        )
        fix = f", or --accept-changes {','.join(named)}" if acceptable == refused else ", or run with --overwrite"
        raise UserError(f"--resume: the recipe differs from that of step {step}: {changes}; undo that{fix}")
    return tuple(changed)


def _is_change(key: str, before: Any, now: Any) -> bool:
    """Check whether a key's new value changes the run."""
    if key == "data.sources":
        before, now = _settings_of(before), _settings_of(now)
    if key == "lora.targets":
        before, now = _targets(before), _targets(now)
    return before != now and key not in UNTOUCHED | PLACES


def _targets(value: Any) -> Any:
    """Return the seven names of earlier recipes as `all-linear`: every model that has these has no others."""
    return "all-linear" if value is not None and tuple(value) == LINEARS else value


def _is_evaluation(key: str) -> bool:
    return key == "evaluation" or key.startswith("evaluation.")


def _acceptable(key: str) -> bool:
    return key in ACCEPTABLE or _is_evaluation(key)


def leaves(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values by dotted key; a list is one value."""
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
    """Refuse to start a new run in a folder with an unfinished one.

    Args:
        folder: The folder of checkpoints.

    Raises:
        UserError: If it has any.
    """
    found = list_checkpoints(folder)
    if found:
        raise UserError(
            f"output_dir: {folder.parent} holds an unfinished run, with {found[0].name}; resume it with --resume, "
            "start again with --overwrite, or set output_dir=OTHER"
        )
