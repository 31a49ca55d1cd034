"""Stop a run on a signal or a non-finite loss, warn of loss spikes, and save at intervals."""

from __future__ import annotations

import math
import signal
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import TrainerCallback

from lora_llava.core.errors import ReportedError
from lora_llava.distributed.ranks import gather

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_SPIKE, _BEFORE = 3.0, 20
"""A loss is a spike at three times the median of the twenty logged before it; untuned."""
_ROWS_NAMED = 16
FLOAT16_LIMIT = (
    "the model does not fit into float16, whose largest value is 65,504: set model.dtype=float32, which is slower, or "
    "train on a GPU with bfloat16 (RTX 30 or newer)"
)


class PoisonedError(ReportedError):
    """A loss or a gradient is not finite; the weights were not updated with it."""

    exit_code = 3


class StopOnSignal(TrainerCallback):
    """Stop after the step on Ctrl-C, SIGTERM or SIGHUP, with a checkpoint; a second Ctrl-C stops at once.

    Attributes:
        number: The signal that was received; None if none was.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals in a `with` block; outside the main thread Python allows no handlers, and nothing happens."""
        previous: dict[int, Any] = {}
        try:
            for name in _SIGNALS:
                if hasattr(signal, name):  # Windows has no SIGHUP
                    number = getattr(signal, name)
                    previous[number] = signal.signal(number, self._on_signal)
        except ValueError:
            pass
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is None:
            self.number = number
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            print(f"\nstopping after this step{again}", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # All ranks stop at the same step, whichever of them received the signal.
        received = next((number for number in gather(self.number) if number is not None), None)
        if received is None:  # one that came meanwhile is handled at the next step
            return
        self.number = received
        if state.global_step < state.max_steps:
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True
            args.load_best_model_at_end = False  # nothing is exported


class RefuseNaN(TrainerCallback):
    """Check the losses and gradients of a step before the weights are updated.

    Args:
        rows_of: Returns the names of the rows of a forward pass, by its number in the run.
        accumulation: Forward passes per step.

    Attributes:
        overflows: Steps that loss scaling skips, as their scaled gradients are too large for float16.
    """

    def __init__(self, rows_of: Callable[[int], list[str]], accumulation: int) -> None:
        self.rows_of, self.accumulation = rows_of, accumulation
        self.losses: list[torch.Tensor] = []
        self.overflows: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses.clear()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        gradients = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])  # as clip_grad_norm_ does
        losses = torch.stack([loss.detach().float() for loss in self.losses])
        finite = torch.cat([losses, norms.sum().reshape(1).to(losses.device)]).isfinite().tolist()  # one GPU sync
        # A rank sees its shard of the gradients only, and its loss is in the gradients of all ranks.
        found = gather(None if all(finite) else self._blame(state.global_step, finite[:-1]))
        blamed = [each for each in found if each is not None]
        if not blamed:
            return
        what = max(what for what, _ in blamed)  # a loss rather than a gradient
        scaler = getattr(optimizer, "scaler", None)
        if what == "gradient" and scaler is not None and scaler.get_scale() > 1:  # its next scale is half of this one
            self.overflows.append(state.global_step + 1)
            return
        rows = [row for kind, rows in blamed if kind == what for row in rows]
        listed = ", ".join(rows[:_ROWS_NAMED]) + (
            f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
        )
        raise PoisonedError(
            f"step {state.global_step + 1}: the {what} is not a number (NaN or infinite); the weights were not updated "
            f"and nothing was saved. Look at its rows: {listed}; fix them and start again with --overwrite, or lower "
            "the learning rate and resume with --resume --accept-changes training.learning_rate"
            + (f"; or {FLOAT16_LIMIT}" if scaler is not None else "")
        )

    def _blame(self, step: int, finite: list[bool]) -> tuple[str, list[str]]:
        """Return which value is not finite on this rank, and the rows it may come from."""
        bad = [number for number, is_finite in enumerate(finite) if not is_finite]
        passes = bad or range(len(finite))
        first = step * self.accumulation
        return "loss" if bad else "gradient", [row for number in passes for row in self.rows_of(first + number)]


class WarnOfSpikes(TrainerCallback):
    """Warn of a logged loss far above those before it."""

    def __init__(self) -> None:
        self.before: deque[float] = deque(maxlen=_BEFORE)
        self.steps: list[int] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if len(self.before) == _BEFORE and loss > _SPIKE * (usual := statistics.median(self.before)):
            self.steps.append(state.global_step)
            warning = f"step {state.global_step}: the loss is {loss:.4f}, {loss / usual:.1f} times what it was"
            tqdm.write(warning, file=sys.stderr)
        self.before.append(loss)


class StopEarly(TrainerCallback):
    """Stop once the validation loss has not fallen in some validations.

    It is counted in the trainer's log, which every checkpoint has: a resumed run stops where an unbroken one does.

    Args:
        patience: Validations in a row without a lower loss.
        min_delta: A loss is lower if it is lower by more than this.

    Attributes:
        reason: Why the run was stopped; None if it was not.
    """

    def __init__(self, patience: int, min_delta: float) -> None:
        self.patience, self.min_delta = patience, min_delta
        self.reason: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reason = None
        self._stop_if_due(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_if_due(state, control)

    def _stop_if_due(self, state: Any, control: Any) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if state.global_step < state.max_steps and count_without_fall(losses, self.min_delta) >= self.patience:
            control.should_training_stop = True
            by = f" by more than {self.min_delta:g}" if self.min_delta else ""
            times = "validation" if self.patience == 1 else f"{self.patience} validations"
            self.reason = f"the validation loss has not fallen{by} in {times}"


def count_without_fall(losses: Iterable[float], min_delta: float) -> int:
    """Count the losses at the end of a run that are not lower than the lowest before them by more than `min_delta`."""
    lowest, count = math.inf, 0
    for loss in losses:
        lowest, count = (loss, 0) if loss < lowest - min_delta else (lowest, count + 1)
    return count


class SaveEvery(TrainerCallback):
    """Save at intervals of steps or minutes, in addition to the checkpoints of validations.

    Args:
        steps: Steps between checkpoints, or None.
        minutes: Minutes between checkpoints, or None.
        clock: A monotonic clock in seconds.
    """

    def __init__(self, steps: int | None, minutes: float | None, clock: Callable[[], float]) -> None:
        self.steps, self.minutes, self.clock = steps, minutes, clock
        self.last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.steps is not None and state.global_step % self.steps == 0:
            control.should_save = True
        if (
            self.minutes is not None and gather(self.clock() - self.last)[0] >= 60 * self.minutes
        ):  # the clock of the first rank
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = self.clock()
