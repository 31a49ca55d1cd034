"""Interrupt saves, and damage files afterwards."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lora_llava.core.errors import UserError
from lora_llava.runs.checkpoint import list_checkpoints, newest_complete
from lora_llava.runs.trainer_state import gather_random
from lora_llava.training import stages
from lora_llava.training.trainer import LlavaSFTTrainer

WRITES = {"write", "fsync", "rename", "mkdir", "unlink", "rmdir", "remove", "replace", "serialize_file", "copyfile"}


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda file: file.unlink(),
    "halved": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "one bit": flipped,
}


def damaged_silently(folder: Path) -> tuple[int, list[str]]:
    """Damage every file of the newest checkpoint in every way; return the number and those not detected."""
    newest = list_checkpoints(folder)[0]
    files = sorted(file for file in newest.rglob("*") if file.is_file())
    unseen = []
    tried = 0
    for file in files:
        content = file.read_bytes()
        for name, damage in DAMAGES.items():
            if not content and name != "missing":
                continue
            damage(file)
            tried += 1
            found, skipped = newest_complete(folder)
            if found == newest or len(skipped) != 1 or file.name not in skipped[0]:
                unseen.append(f"{name} {file}")
            file.write_bytes(content)
    assert newest_complete(folder)[0] == newest
    return tried, unseen


class AtStep(TrainerCallback):
    """Call a function with the trainer at the end of a step."""

    def __init__(self, step: int, act: Callable[[LlavaSFTTrainer], None]) -> None:
        self.step, self.act = step, act
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act(self.trainer)


def act_at(step: int, act: Callable[[LlavaSFTTrainer], None], put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Call a function at the end of a step of later runs; `put` sets an attribute, such as `monkeypatch.setattr`."""
    build = stages.build_trainer

    def built(*args: Any) -> Any:
        found = build(*args)
        callback = AtStep(step, act)
        callback.trainer = found[0]
        found[0].add_callback(callback)
        return found

    put(stages, "build_trainer", built)


def in_child(act: Callable[[], None], on_call: Callable[[int, str], None]) -> int:
    """Run a function in a forked process that observes every write; return its exit code."""
    pid = os.fork()
    if pid == 0:
        calls = 0

        def look(frame: Any, event: str, called: Any) -> None:
            nonlocal calls
            text = isinstance(getattr(called, "__self__", None), str | list)  # they have `replace` and `remove` too
            if event == "c_return" and getattr(called, "__name__", "") in WRITES and not text:
                calls += 1
                on_call(calls, called.__name__)

        code = 1
        try:
            sys.setprofile(look)
            act()
            code = 0
        except UserError as error:
            code = 2 if "the disk is full" in str(error) else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ends_at_every_write(trainer: LlavaSFTTrainer, end: Callable[[], None], stride: int) -> list[tuple[int, str | None]]:
    """Save in processes that end after each `stride`-th write, until one saves completely.

    Returns each exit code with the newest complete checkpoint.
    """
    folder = Path(trainer.args.output_dir)
    found: list[tuple[int, str | None]] = []
    for last in range(1, 100_000, stride):

        def on_call(calls: int, name: str, last: int = last) -> None:
            if calls == last:
                sys.setprofile(None)
                end()

        code = in_child(lambda: trainer.save_checkpoint(gather_random()), on_call)
        newest, _ = newest_complete(folder)
        found.append((code, newest and newest.name))
        for each in folder.glob("*checkpoint-3*"):
            shutil.rmtree(each)
        if code == 0:
            return found
    raise AssertionError


def full() -> None:
    raise OSError(28, "No space left on device")
