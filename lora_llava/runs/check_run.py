"""Say what is wrong with a path that should be a run: misspelt, still in progress, unfinished, or a folder of runs."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from lora_llava.core.errors import UserError
from lora_llava.model.start import RUN_FILE
from lora_llava.recipe.io import RECIPE_FILE
from lora_llava.runs.checkpoint import list_checkpoints
from lora_llava.runs.directory import LOCK_RECORD, is_run

CHECKPOINTS = "checkpoints"
_INSIDE = re.compile(rf"{CHECKPOINTS}|checkpoint-\d+")
_OF_A_RUN = (RUN_FILE, RECIPE_FILE, "config.json", "predictions.jsonl", "predictions_after.jsonl")
_NAMED = 5
"""Most runs that a message lists."""
_USUAL = "runs"
"""The folder in which the shipped recipes put their runs."""


def check_run(path: str | Path, wanted: str = "a run directory", *, hub: bool = False) -> None:
    """Refuse a path that is certainly not a finished run or a model, and name what was meant.

    Args:
        path: A path as the person wrote it.
        wanted: What should be named, for the message.
        hub: Whether the path may also be a Hub id; one that resembles no run is then accepted.

    Raises:
        UserError: For a path that does not exist, is inside a run, or is a run that is not finished.
    """
    folder = Path(path)
    if not folder.exists():
        near = list(_similar(str(path)))
        if not near and hub and _may_be_on_the_hub(str(path)):
            return
        listed = near[:1] or _runs_in(folder.parent if str(folder.parent) != "." else Path(_USUAL))
        meant = f" (did you mean {listed[0]}?)" if near else ""
        choices = "" if near or not listed else f", such as {', '.join(listed[:_NAMED])}"
        raise UserError(f"{path} does not exist{meant}; name {wanted}{choices}")
    if problem := _problem(folder):
        raise UserError(problem)


def _problem(folder: Path) -> str | None:
    if owner := in_progress(folder):
        return f"{folder} is a run in progress ({owner}); wait until it has finished"
    outer = next((each for each in list(folder.absolute().parents)[:2] if (each / RECIPE_FILE).is_file()), None)
    if (
        outer is not None
        and not folder.name.endswith(".jsonl")
        and (folder.is_file() or _INSIDE.fullmatch(folder.name))
    ):
        return f"{folder} is a part of a run; name its folder, {os.path.relpath(outer)}"
    if not folder.is_dir() or is_run(folder):
        return None
    checkpoints = list_checkpoints(folder / CHECKPOINTS)
    if checkpoints:
        resume = "finish it with the command that started it and --resume"
        return f"{folder} is an unfinished run, whose last checkpoint is {checkpoints[0].name}; {resume}"
    if not any((folder / name).is_file() for name in _OF_A_RUN) and (runs := _runs_in(folder)):
        more = f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else ""
        return f"{folder} is a folder of runs; name one: {', '.join(runs[:_NAMED])}{more}"
    return None


def in_progress(folder: Path) -> str | None:
    """Return which process trains in a run directory, such as `process 12 on host, since ...`; None if none does."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads((folder / LOCK_RECORD).read_text(encoding="utf-8"))
        if owner["host"] == platform.node() and os.name != "nt":  # on Windows signal 0 would end the process
            os.kill(int(owner["process"]), 0)
        if owner["process"] != os.getpid():
            return f"process {owner['process']} on {owner['host']}, since {owner['since']}"
    return None


def _runs_in(folder: Path) -> list[str]:
    """Return the runs and models directly in a folder, by name."""
    with contextlib.suppress(OSError):
        return [str(each) for each in sorted(folder.iterdir()) if any((each / name).is_file() for name in _OF_A_RUN)]
    return []


def _similar(path: str) -> Iterator[str]:
    """Yield existing runs whose name resembles the last part of a path, the nearest first."""
    folder = Path(path.replace("\\", "/").rstrip("/"))
    places = [folder.parent] if folder.parent.is_dir() else []
    runs = list(dict.fromkeys(run for place in [*places, Path(), Path(_USUAL)] for run in _runs_in(place)))
    names = {run: _plain(Path(run).name) for run in runs}
    name = _plain(folder.name)
    yield from (run for run, each in names.items() if each == name)
    close = difflib.get_close_matches(name, names.values(), 3)
    yield from (run for each in close for run, known in names.items() if known == each != name)
    yield from (run for run, each in names.items() if len(name) > 3 and name in each and each not in (name, *close))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name).lower()


def _may_be_on_the_hub(path: str) -> bool:
    owner, _, name = path.partition("/")
    return bool(re.fullmatch(r"[\w][\w.-]*", owner) and re.fullmatch(r"[\w.-]+", name)) and not _runs_in(Path(owner))
