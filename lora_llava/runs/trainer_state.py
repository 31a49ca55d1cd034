"""What a trainer's checkpoint holds beside the weights, and how it comes back."""

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
    """Write optimiser, schedule, random numbers and counters, the trainer's own state, and what the run is.

    Args:
        trainer: At the end of a step.
        folder: The checkpoint.
        optimizer: The optimiser's state, whole.
        random: Of every process, from `random_state`.
        loss: Summed since it was logged, from `mean_loss`.
    """
    save_state(
        folder,
        {
            "optimizer": optimizer,
            "scheduler": trainer.lr_scheduler.state_dict(),
            "random": random,
            "counters": _counters(trainer) | {"loss": loss},
        },
    )
    # Without the path of the best checkpoint, which is wrong once the run is moved: its step says which one it is.
    replace(trainer.state, best_model_checkpoint=None).save_to_json(str(folder / TRAINER_STATE_NAME))
    write_json(folder / IDENTITY_FILE, trainer.identity)


def _counters(trainer: Trainer) -> dict[str, Any]:
    return {
        "tokens": trainer.tokens_of_all,
        "seconds": trainer.seconds,
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "means": {mode: dict(values) for mode, values in trainer._metrics.items()},
    }


def restore_optimizer(trainer: Trainer, folder: Path, changed: tuple[str, ...]) -> dict[str, Any]:
    """Bring optimiser and schedule back; what the recipe says anew takes effect.

    Args:
        trainer: With a fresh optimiser and schedule.
        folder: The checkpoint.
        changed: Keys of the recipe that are others than the checkpoint's.

    Returns:
        The rest of the state, for `restore_counters` and `restore_random`.
    """
    state: dict[str, Any] = load_state(folder)
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    fresh = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    rates = list(scheduler.base_lrs)
    optimizer.load_state_dict(state.pop("optimizer"))
    shard_states(optimizer)
    scheduler.load_state_dict(state.pop("scheduler"))
    if changed:
        for group, values in zip(optimizer.param_groups, fresh, strict=True):
            group.update(values)
        # As LambdaLR works them out (torch, optim/lr_scheduler.py).
        scheduler.base_lrs = rates
        scheduler._last_lr = [
            rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
    return state


def restore_counters(trainer: Trainer, state: dict[str, Any]) -> None:
    """Bring back what is logged and counted, once the trainer has set it to nothing."""
    counters = state["counters"]
    first = trainer.args.process_index == 0  # the others count from nothing: it is the sum that is told
    trainer.tokens_seen, trainer.supervised_tokens_seen = counters["tokens"] if first else (0, 0)
    trainer.join_tokens()
    trainer.seconds_before = counters["seconds"]
    trainer._tr_loss = counters["loss"].to(trainer.args.device)
    trainer._total_loss_scalar, trainer._globalstep_last_logged = counters["total_loss"], counters["last_logged"]
    for mode, values in counters["means"].items():
        for key, value in values.items():
            trainer._metrics[mode][key] = list(value)


def take_counters(trainer: Trainer) -> dict[str, Any]:
    """What is counted and where random numbers stand between two steps, for `put_counters`."""
    means = {mode: {key: list(value) for key, value in values.items()} for mode, values in trainer._metrics.items()}
    tokens = trainer.tokens_seen, trainer.supervised_tokens_seen
    return {"random": random_state(), "tokens": tokens, "loss": trainer._tr_loss.detach().clone(), "means": means}


def put_counters(trainer: Trainer, kept: dict[str, Any]) -> None:
    """Count as at the end of the last step; random numbers stay."""
    trainer.tokens_seen, trainer.supervised_tokens_seen = kept["tokens"]
    trainer._tr_loss = kept["loss"].clone()
    for mode, values in kept["means"].items():
        trainer._metrics[mode].clear()
        trainer._metrics[mode].update({key: list(value) for key, value in values.items()})


def restore_random(state: dict[str, Any], process: int) -> None:
    """Put this process's random numbers where they were."""
    set_random_state(state["random"][process])


def gather_random() -> list[dict[str, Any]]:
    """The random numbers' state of every process, in the order of their ranks."""
    return gather(random_state())


def mean_loss(loss: torch.Tensor) -> torch.Tensor:
    """The ranks' mean of a loss that each has summed up, on the CPU."""
    shares = gather(loss.detach().cpu())
    return shares[0] if len(shares) == 1 else torch.stack(shares).mean(0)


def state_bytes(trainer: Trainer) -> int:
    """Bytes that a checkpoint's weights and states will take."""
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    states = sum(
        value.numel() * value.element_size()
        for each in trainer.optimizer.state.values()
        for value in each.values()
        if isinstance(value, torch.Tensor)
    )
    return weights + states
