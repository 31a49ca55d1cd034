"""Kill demo runs at random moments with kill -9 and SIGTERM, resume them, and compare with an uninterrupted run."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than free cores wait for one another

RECIPE = "recipes/demo_scienceqa_qlora.yaml"
SETTINGS = (
    "training.max_steps=30",
    "training.save_every=3",
    "training.eval_every=10",
    "training.log_every=1",
    "training.vision_cache=off",
    "data.max_train_rows=480",
    "model.start_from={untrained: true}",
    "evaluation=null",
)
"""Only Stage 2 runs and is killed; no features are computed beforehand."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--points", type=int, default=100, help="random points of kill -9")
    parser.add_argument("--signals", type=int, default=10, help="random points of SIGTERM")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """End and resume a 30-step run of the demo's recipe, saved every 3 steps, at random moments.

    The final weights, optimizer states and loss curve are compared with those of an uninterrupted run.
    """
    drawn = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = _start(folder / "unbroken", False)
        _wait_for_training(folder / "unbroken", process)
        began = time.monotonic()
        process.join()
        seconds = time.monotonic() - began
        expected = _end_of(folder / "unbroken")
        moments = [drawn.uniform(0, seconds) for _ in range(args.points + args.signals)]
        kills = [_killed(folder / "killed", after, expected) for after in moments[: args.points]]
        terms = [_terminated(folder / "stopped", after, expected) for after in moments[args.points :]]
    stopped = [term for term in terms if term["stopped"]]
    return {
        "recipe": RECIPE,
        "settings": SETTINGS,
        **_saves(),
        "kills": len(kills),
        "bitwise_equal": sum(k["equal"] for k in kills),
        "killed_behind_checkpoint": sorted(k["step"] for k in kills),
        "killed_while_saving": sum(k["saving"] for k in kills),
        "sigterms": len(stopped),
        "sigterms_bitwise_equal": sum(t["equal"] for t in stopped),
        "seconds_from_sigterm_to_exit": _spread([t["seconds"] for t in stopped]),
        "seconds_of_training_and_the_end": seconds,
    }


def _saves() -> dict[str, Any]:
    """Interrupt a save after each write, fsync or rename, by exit and by a full disk, and damage every file."""
    from ends import act_at, damaged_silently, ends_at_every_write, full
    from rich.console import Console

    from lora_llava.recipe import load_recipe
    from lora_llava.training.finetune import finetune

    ends: list[tuple[int, str | None]] = []
    fulls: list[tuple[int, str | None]] = []
    damages: list[tuple[int, list[str]]] = []

    def at_step_3(trainer: Any) -> None:
        ends.extend(ends_at_every_write(trainer, lambda: os._exit(9), 1))
        fulls.extend(ends_at_every_write(trainer, full, 1))
        damages.append(damaged_silently(Path(trainer.args.output_dir)))

    act_at(3, at_step_3)
    with tempfile.TemporaryDirectory() as folder:
        settings = [*SETTINGS, "training.max_steps=4", "training.save_every=2", f"output_dir={folder}/run"]
        finetune(load_recipe(RECIPE, settings), Path("recipes"), console=Console(quiet=True))
    complete = {"checkpoint-2", "checkpoint-3"}
    return {
        "ends_within_a_save": len(ends) - 1,
        "whole_after_each": sum(newest in complete for _, newest in ends[:-1]),
        "full_disks_within_a_save": sum(code == 2 for code, _ in fulls),
        "checkpoint_before_whole": sum(newest == "checkpoint-2" for code, newest in fulls if code == 2),
        "new_checkpoint_whole": sum(newest == "checkpoint-3" for code, newest in fulls if code == 2),
        "damages": damages[0][0],
        "damages_not_seen": damages[0][1],
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "most": max(values)} if values else {}


def _start(folder: Path, resume: bool) -> Any:
    from tests.forked import start

    arguments = ["finetune", RECIPE, *SETTINGS, f"output_dir={folder}", *(["--resume"] if resume else [])]
    return start(arguments)


def _finish(folder: Path, resume: bool) -> None:
    process = _start(folder, resume)
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{folder}: exit code {process.exitcode}")


def _end_of(folder: Path) -> tuple[Any, ...]:
    """Return the end state of a run: bytes of weights, optimizer, schedule and random numbers, and the loss curve."""
    last = folder / "checkpoints" / "checkpoint-30"
    state = json.loads((last / "state.json").read_text())
    seconds = [pair for pair in dict(state["dict"])["counters"]["dict"] if pair[0] == "seconds"]
    seconds[0][1] = 0
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    losses = [(entry["step"], entry.get("loss"), entry.get("eval_loss")) for entry in history]
    files = [last / "adapter_model.safetensors", last / "state.safetensors", folder / "adapter_model.safetensors"]
    return ([file.read_bytes() for file in files], state, losses)


def _wait_for_training(folder: Path, process: Any) -> None:
    while process.is_alive() and not (folder / "checkpoints").is_dir():
        time.sleep(0.001)


def _newest(folder: Path) -> int:
    found = [int(each.name.removeprefix("checkpoint-")) for each in (folder / "checkpoints").glob("checkpoint-*")]
    return max(found, default=0)


def _killed(folder: Path, after: float, expected: tuple[Any, ...]) -> dict[str, Any]:
    """Kill a run some seconds after training began, and resume it to the end."""
    process = _start(folder, False)
    _wait_for_training(folder, process)
    process.join(after)
    process.kill()
    process.join()
    step = _newest(folder)
    saving = bool(list((folder / "checkpoints").glob(".checkpoint-*")))
    if not (folder / "run.json").is_file():
        _finish(folder, resume=step > 0)
    equal = _end_of(folder) == expected
    shutil.rmtree(folder)
    event = f"killed after step {step}{', while saving' if saving else ''}"
    print(f"{event}: {'equal' if equal else 'NOT EQUAL'}", file=sys.stderr, flush=True)
    return {"step": step, "saving": saving, "equal": equal}


def _terminated(folder: Path, after: float, expected: tuple[Any, ...]) -> dict[str, Any]:
    """Stop a run by SIGTERM some seconds after training began, and resume it to the end."""
    process = _start(folder, False)
    _wait_for_training(folder, process)
    process.join(after)
    sent = time.monotonic()
    with contextlib.suppress(ProcessLookupError):  # it had finished
        os.kill(process.pid, signal.SIGTERM)
    process.join()
    seconds = time.monotonic() - sent
    stopped = process.exitcode == 143
    if not (folder / "run.json").is_file():
        _finish(folder, resume=stopped)
    equal = _end_of(folder) == expected
    shutil.rmtree(folder)
    print(f"SIGTERM: {seconds:.2f} s, {'equal' if equal else 'NOT EQUAL'}", file=sys.stderr, flush=True)
    return {"stopped": stopped, "seconds": seconds, "equal": equal}
