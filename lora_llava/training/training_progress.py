"""The progress line of training."""

from __future__ import annotations

import sys
from typing import Any

import psutil
import torch
from tqdm import tqdm
from transformers import TrainerCallback

from lora_llava.core.progress import progress_bar

Trainer = Any


def peak_memory_bytes() -> int:
    """Return the peak memory: of the GPU if there is one, else of the process's resident set."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # on Windows
        found = psutil.Process().memory_info()
        return int(getattr(found, "peak_wset", found.rss))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_reserved_bytes() -> int | None:
    """Return the peak memory that torch took from the GPU, free blocks included; None without a GPU."""
    return int(torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else None


class ProgressLine(TrainerCallback):
    """One line: loss, tokens per second, share of trained tokens, memory, and tqdm's rate and ETA.

    Args:
        description: Text before the bar.
    """

    def __init__(self, description: str) -> None:
        self.description = description
        self.trainer: Trainer = None
        self.bar: tqdm[Any] | None = None
        self.before = 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = progress_bar(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.description,
            unit="step",
            mininterval=0.2,
        )
        if self.trainer is not None:
            self.before = self.trainer.tokens_of_all[0], self.trainer.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.bar is None or self.trainer is None or not logs:
            return
        if "eval_loss" in logs:
            self.bar.write(f"step {state.global_step}: validation loss {float(logs['eval_loss']):.4f}", file=sys.stderr)
        if "loss" in logs:
            tokens, supervised = self.trainer.tokens_of_all
            speed = (tokens - self.before[0]) / max(1e-3, self.trainer.seconds - self.before[1])
            share = 100 * supervised / max(1, tokens)
            self.bar.set_postfix_str(
                f"loss {float(logs['loss']):.4f}, {speed:,.0f} tok/s, "
                f"{share:.0f}% trained, {peak_memory_bytes() / 2**30:.1f} GiB",
                refresh=False,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
