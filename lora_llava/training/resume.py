"""What a run goes on from, and whether it is still the same run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.errors import UserError, nearest
from lora_llava.recipe import Recipe, load_recipe
from lora_llava.training.checkpoint import list_checkpoints, newest_whole, read_manifest
from lora_llava.training.run_directory import DATA_FILE, RECIPE_FILE, read_data_hashes

UNTOUCHED = frozenset({
    "output_dir", "training.report_to", "training.workers", "training.log_every", "training.save_every",
    "training.memory_gb", "training.gradient_checkpointing",
})  # fmt: skip
"""Keys that change nothing of what is trained, beside all of `evaluation`."""
ACCEPTABLE = frozenset({
    "training.epochs", "training.max_steps", "training.learning_rate", "training.projector_learning_rate",
    "training.weight_decay", "training.warmup_ratio", "training.lr_scheduler", "training.max_grad_norm",
    "training.projector_dropout", "training.eval_every", "training.vision_cache", "lora.dropout",
})  # fmt: skip
"""Keys that may change on the way, where the person says so. All others change what a step or the model is."""


@dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes:
        checkpoint: The newest that is whole.
        step: Its optimiser step.
        changed: Keys of the recipe that were accepted to be others than before.
        told: Lines for the person: what was passed over and why, and what was taken.
    """

    checkpoint: Path
    step: int
    changed: tuple[str, ...]
    told: tuple[str, ...]


def find_start(folder: Path, recipe: Recipe, rows: str, accepted: Iterable[str] = (), processes: int = 1) -> Start:
    """Find the newest whole checkpoint, and hold the recipe and the rows against its own.

    Args:
        folder: Where the checkpoints are.
        recipe: As it is now.
        rows: Fingerprint of the training rows.
        accepted: Keys that may have changed.
        processes: That train together now.

    Returns:
        Where to go on.

    Raises:
        UserError: Where there is none, or something changed that was not accepted.
    """
    checkpoint, passed_over = newest_whole(folder)
    if checkpoint is None:
        if passed_over:
            raise UserError(f"--resume: no checkpoint is whole ({'; '.join(passed_over)}); run with --overwrite")
        raise UserError(f"--resume: {folder} holds no checkpoint; run without it")
    if read_data_hashes(checkpoint).get("train") != rows:
        raise UserError(
            f"--resume: the training rows are not those of {checkpoint} ({DATA_FILE}): data or the recipe's "
            "data section have changed; take that back, or run with --overwrite"
        )
    manifest = read_manifest(checkpoint)
    step, before = int(manifest["step"]), manifest.get("processes", 1)
    if before != processes:
        raise UserError(
            f"--resume: {checkpoint} was written by {before} processes that trained together, and now there are "
            f"{processes}; start as many, or run with --overwrite"
        )
    changed = check_changes(load_recipe(checkpoint / RECIPE_FILE), recipe, accepted, step)
    told = [f"passed over {each}; it is kept as damaged-{each.partition(':')[0]}" for each in passed_over]
    accepted_told = f", with another {', '.join(changed)}" if changed else ""
    return Start(checkpoint, step, changed, (*told, f"going on from {checkpoint} at step {step}{accepted_told}"))


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
        if key not in ACCEPTABLE:
            hint = nearest(key, ACCEPTABLE) or f"; these can: {', '.join(sorted(ACCEPTABLE))}"
            raise UserError(f"--accept-changes: {key} cannot change within a run{hint}")
    old, new = leaves(before), leaves(now)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not _untouched(key)]
    refused = [key for key in changed if key not in accepted]
    if refused:
        told = "; ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in refused)
        able = [key for key in refused if key in ACCEPTABLE]
        mend = f", or --accept-changes {','.join(able)}" if able == refused else ", or run with --overwrite"
        raise UserError(f"--resume: the recipe is not that of step {step}: {told}; take that back{mend}")
    return tuple(changed)


def _untouched(key: str) -> bool:
    return key in UNTOUCHED or key.startswith("evaluation")


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
