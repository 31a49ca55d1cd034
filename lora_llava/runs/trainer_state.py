"""A checkpoint's optimizer, schedule, random numbers and counters: saved and restored.

`_tr_loss`, `_total_loss_scalar` and `_globalstep_last_logged` (transformers) and `_metrics` (trl) are private, and are
used here only: no public attribute has the loss and metrics summed since the last log.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME

from lora_llava.distributed.ranks import gather
from lora_llava.distributed.sharding import shard_states
from lora_llava.runs.directory import write_json
from lora_llava.runs.identity import IDENTITY_FILE
from lora_llava.runs.state_files import load_state, random_state, save_state, set_random_state

Trainer = Any


def save_trainer_state(
    trainer: Trainer, folder: Path, optimizer: dict[str, Any], random: list[dict[str, Any]], loss: torch.Tensor
) -> None:
    """Write optimizer, schedule, loss scaling, random numbers, counters, the trainer's state and the run's identity.

    Args:
        trainer: A trainer at the end of a step.
        folder: The checkpoint.
        optimizer: The optimizer's state, with full tensors.
        random: The random state of every process, from `random_state`.
        loss: The loss summed since the last log, from `mean_loss`.
    """
    save_state(
        folder,
        {
            "optimizer": optimizer,
            "scheduler": trainer.lr_scheduler.state_dict(),
            "random": random,
            "counters": _counters(trainer) | {"loss": loss},
            "scaler": scaler.state_dict() if (scaler := trainer.accelerator.scaler) is not None else None,
        },
    )
    # Without the path of the best checkpoint, which is wrong once the run is moved; its step identifies it.
    replace(trainer.state, best_model_checkpoint=None).save_to_json(str(folder / TRAINER_STATE_NAME))
    write_json(folder / IDENTITY_FILE, trainer.identity)


def _counters(trainer: Trainer) -> dict[str, Any]:
    return {
        "tokens": trainer.tokens_of_all,
        "seconds": trainer.seconds,
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "overflows": list(trainer.overflows),
        "means": {mode: dict(values) for mode, values in trainer._metrics.items()},
    }


def restore_optimizer(trainer: Trainer, folder: Path, changed: tuple[str, ...]) -> dict[str, Any]:
    """Restore optimizer, schedule and loss scaling; settings changed in the recipe take effect.

    Args:
        trainer: A trainer with a fresh optimizer and schedule.
        folder: The checkpoint.
        changed: Keys of the recipe that differ from the checkpoint's.

    Returns:
        The rest of the state, for `restore_counters` and `restore_random`.
    """
    state: dict[str, Any] = load_state(folder)
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    fresh = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    rates = list(scheduler.base_lrs)
    optimizer.load_state_dict(state.pop("optimizer"))
    shard_states(optimizer)
    page_states(optimizer)
    if (scale := state.pop("scaler", None)) is not None:
        trainer.accelerator.scaler.load_state_dict(scale)
    scheduler.load_state_dict(state.pop("scheduler"))
    if changed:
        for group, values in zip(optimizer.param_groups, fresh, strict=True):
            group.update(values)
        # The rates that LambdaLR computes (torch, optim/lr_scheduler.py).
        scheduler.base_lrs = rates
        scheduler._last_lr = [
            rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
    return state


def page_states(optimizer: Any) -> None:
    """Move loaded states of a paged optimizer into paged memory, where a new optimizer makes them.

    bitsandbytes loads them into the GPU's memory, from which they cannot be paged out (optim/optimizer.py,
    Optimizer8bit.load_state_dict).

    Args:
        optimizer: Any optimizer, as accelerate wraps it or not; only one of bitsandbytes has paged states.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not getattr(inner, "is_paged", False):
        return
    for parameter, states in inner.state.items():
        for name in ("state1", "state2"):
            if name in states:
                states[name] = inner.get_state_buffer(parameter, dtype=states[name].dtype).copy_(states[name])


def restore_counters(trainer: Trainer, state: dict[str, Any]) -> None:
    """Restore the counters and the loss summed since the last log, after the trainer has reset them."""
    counters = state["counters"]
    first = trainer.args.process_index == 0  # the others start at 0, as only the sum is reported
    trainer.tokens_seen, trainer.supervised_tokens_seen = counters["tokens"] if first else (0, 0)
    trainer.join_tokens()
    trainer.seconds_before = counters["seconds"]
    trainer.overflows[:] = counters.get("overflows", [])
    trainer._tr_loss = counters["loss"].to(trainer.args.device)
    trainer._total_loss_scalar, trainer._globalstep_last_logged = counters["total_loss"], counters["last_logged"]
    for mode, values in counters["means"].items():
        for key, value in values.items():
            trainer._metrics[mode][key] = list(value)


def take_counters(trainer: Trainer) -> dict[str, Any]:
    """Return the counters and the random state between two steps, for `put_counters`."""
    means = {mode: {key: list(value) for key, value in values.items()} for mode, values in trainer._metrics.items()}
    tokens = trainer.tokens_seen, trainer.supervised_tokens_seen
    return {"random": random_state(), "tokens": tokens, "loss": trainer._tr_loss.detach().clone(), "means": means}


def put_counters(trainer: Trainer, kept: dict[str, Any]) -> None:
    """Reset the counters to the end of the last step, without the random state."""
    trainer.tokens_seen, trainer.supervised_tokens_seen = kept["tokens"]
    trainer._tr_loss = kept["loss"].clone()
    for mode, values in kept["means"].items():
        trainer._metrics[mode].clear()
        trainer._metrics[mode].update({key: list(value) for key, value in values.items()})


def restore_random(state: dict[str, Any], process: int) -> None:
    """Restore the random state of this process."""
    set_random_state(state["random"][process])


def gather_random() -> list[dict[str, Any]]:
    """Return the random state of every process, in the order of ranks."""
    return gather(random_state())


def mean_loss(loss: torch.Tensor) -> torch.Tensor:
    """Return the mean over ranks of their summed losses, on the CPU."""
    shares = gather(loss.detach().cpu())
    return shares[0] if len(shares) == 1 else torch.stack(shares).mean(0)


def state_bytes(trainer: Trainer) -> int:
    """Return the bytes of a checkpoint's weights and optimizer states."""
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    states = sum(
        value.numel() * value.element_size()
        for each in trainer.optimizer.state.values()
        for value in each.values()
        if isinstance(value, torch.Tensor)
    )
    return weights + states
