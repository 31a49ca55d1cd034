"""The trainer: TRL's `SFTTrainer` with our rows and collator, two learning rates, and an fp32 projector."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.distributed.sharding import is_sharded, load_weights, share_out, whole, whole_weights
from lora_llava.model.adapters import trained_projector
from lora_llava.model.fast_path.trained_loss import count_labels, labelled_loss
from lora_llava.runs.checkpoint import best_of_run, newest_whole, remove_old, written_whole
from lora_llava.runs.directory import DATA_FILE, RECIPE_FILE
from lora_llava.runs.identity import is_of_run
from lora_llava.runs.state_files import random_state
from lora_llava.runs.trainer_state import (
    gather_random,
    mean_loss,
    put_counters,
    restore_counters,
    restore_optimizer,
    restore_random,
    save_trainer_state,
    state_bytes,
    take_counters,
)
from lora_llava.training.progress import peak_memory_bytes

KEPT = 2
"""Newest checkpoints that stay, beside the best: one may turn out to be damaged."""


class _Between(TrainerCallback):
    """Tells the trainer when training begins, after it has set all to nothing, when weights change, and when a step has
    ended."""

    def __init__(self, begin: Callable[[], None], change: Callable[[], None], step: Callable[[], None]) -> None:
        self.begin, self.change, self.step = begin, change, step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.change()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step()


@dataclass(frozen=True)
class Feed:
    """What a split feeds to training.

    Attributes:
        samples: With `input_ids`, `labels` and `image_files`.
        rows: Indices of the samples of each forward pass; of several ranks, r has `rows[r::ranks]`.
        collator: Makes a batch of them.
    """

    samples: Sequence[dict[str, Any]]
    rows: list[list[int]]
    collator: Any


@dataclass(frozen=True)
class _Collate:
    """Collates; of an empty row, which makes ranks' passes as many, a sample without labels."""

    collator: Any
    sample: dict[str, Any]

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Any:
        unlabelled = dict(self.sample) | {"labels": [IGNORE_INDEX] * len(self.sample["input_ids"])}
        return self.collator(samples or [unlabelled])


def _stand_in(feed: Feed) -> Dataset:
    """One sample as a `datasets.Dataset`, which is what SFTTrainer looks at; our loaders feed the rest as it is."""
    return Dataset.from_list([feed.samples[0]])


class LlavaSFTTrainer(SFTTrainer):
    """`SFTTrainer` for encoded LLaVA rows.

    Args:
        model: The PEFT model of `add_adapters`.
        args: From `stages.training_arguments`.
        train: The training samples, in which order, and how they become batches.
        validation: The same of the validation split, or None.
        processor: The stock processor; saved with every checkpoint.
        projector_learning_rate: Peak rate of the projector.
        callbacks: Added to the trainer's own.
    """

    def __init__(
        self, model: PeftModel, args: SFTConfig, *, train: Feed, validation: Feed | None, processor: Any,
        projector_learning_rate: float, callbacks: list[TrainerCallback],
    ) -> None:  # fmt: skip
        self.projector_learning_rate = projector_learning_rate
        self._feeds = {"train": train, "validation": validation}
        self.tokens_seen = 0
        self.supervised_tokens_seen = 0
        self.tokens_of_all = (0, 0)
        self._validation: list[tuple[float, int]] = []
        self._logged: tuple[float, int] | None = None
        self.seconds_before, self.seconds_off_the_clock, self._began = 0.0, 0.0, time.monotonic()
        self.changed: tuple[str, ...] = ()
        self.told_of_run: dict[str, Any] = {}
        self.identity: dict[str, Any] = {}
        self._resumed: dict[str, Any] = {}
        self._random_at_step: dict[str, Any] | None = None
        self._at_rest: dict[str, Any] | None = None
        self._weights_whole = True
        self.on_loss: Callable[[torch.Tensor], None] = lambda loss: None
        self.on_begin: Callable[[], None] = lambda: None
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        between = _Between(self._begin, self._weights_change, self._step_ended)
        super().__init__(
            model=model, args=args, train_dataset=_stand_in(train),
            eval_dataset=_stand_in(validation) if validation else None, data_collator=train.collator,
            processing_class=processor, callbacks=[between, *callbacks],
        )  # fmt: skip
        self._restore_dtypes(trained)

    def _begin(self) -> None:
        if self._resumed:
            restore_counters(self, self._resumed)
            self.state.compute_steps(self.args, self.state.max_steps)  # what the recipe says now
            self._place_best()
        self.on_begin()
        if self.state.global_step >= self.state.max_steps:
            self._validate_what_is_due()
        self._began, self.seconds_off_the_clock = time.monotonic(), 0.0

    def _weights_change(self) -> None:
        self._weights_whole = False

    def _step_ended(self) -> None:
        self._weights_whole, self._at_rest, self._random_at_step = True, None, random_state()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._at_rest = take_counters(self)

    def _validate_what_is_due(self) -> None:
        """Validate where a run was stopped between a step and its validation, as it would have gone on."""
        state, history = self.state, self.state.log_history
        due = state.global_step % state.eval_steps == 0 or state.global_step >= state.max_steps
        known = any(each["step"] == state.global_step and "eval_loss" in each for each in history)
        if self.args.eval_strategy != "no" and due and not known:
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            self._place_best()

    def _place_best(self) -> None:
        """Name the best checkpoint by its step in this run's own folder: the state may come from another place."""
        step = self.state.best_global_step
        best = Path(self.args.output_dir) / f"checkpoint-{step}"
        self.state.best_model_checkpoint = str(best) if step else None

    def _restore_dtypes(self, trained: dict[str, torch.Tensor]) -> None:
        """Undo SFTTrainer's cast of everything trained to bf16 (trl/trainer/sft_trainer.py), in which AdamW's steps
        at 2e-5 are lost to rounding."""
        for name, parameter in self.model.named_parameters():
            if name in trained:
                parameter.data = trained[name]
        projector = trained_projector(self.accelerator.unwrap_model(self.model))
        wrong = [name for name, p in projector.named_parameters() if p.dtype != torch.float32]
        if wrong:
            raise RuntimeError(f"the projector's {wrong[0]} is not float32")

    def get_train_dataloader(self) -> Any:
        """Rows as they were laid out: one long pass over the whole run, which a resumed run skips into."""
        return self._loader("train")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The validation rows, with their own images."""
        return self._loader("validation")

    def _loader(self, split: str) -> Any:
        feed = self._feeds[split]
        assert feed is not None  # without validation there is no evaluation
        loader: Any = DataLoader(
            feed.samples,  # type: ignore[arg-type]
            batch_sampler=feed.rows[self.args.process_index :: self.args.world_size],
            collate_fn=_Collate(feed.collator, feed.samples[0]),
            num_workers=self.args.dataloader_num_workers, pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip
        # Not accelerate's own sharding: it repeats rows from the start where ranks' shares differ.
        return prepare_data_loader(loader, self.accelerator.device, 1, 0, put_on_device=True)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Give the projector its own rate, and decay matrices alone."""
        optimizer: torch.optim.Optimizer | None = getattr(self, "optimizer", None)
        if optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            optimizer = optimizer_class(self._parameter_groups(), **options)
            self.optimizer = optimizer
        return optimizer

    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(("multi_modal_projector" in name, parameter.ndim > 1), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": self.projector_learning_rate if is_projector else self.args.learning_rate,
                "weight_decay": self.args.weight_decay if is_matrix else 0.0,
            }
            for (is_projector, is_matrix), parameters in groups.items()
        ]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Count tokens on the way to TRL's loss, whose fused head scores trained tokens alone on CUDA, and every token
        elsewhere (trl/trainer/utils.py, add_fused_lm_head): there, ours does."""
        count = count_labels(inputs)
        if model.training and count:  # without a label it is a pass for the other ranks' sake
            padding = int((inputs["attention_mask"] == 0).sum()) if "attention_mask" in inputs else 0
            self.tokens_seen += inputs["input_ids"].numel() - padding
            self.supervised_tokens_seen += count
        if inputs["labels"].is_cuda:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        else:
            loss = self._labelled_loss(model, inputs, kwargs.get("num_items_in_batch"))
        if not model.training:
            self._validation += [(float(loss) * count, count)]
            return loss
        self.on_loss(loss)
        return loss

    def _labelled_loss(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        count = count_labels(inputs)
        total, correct = labelled_loss(model, inputs)
        both = self.accelerator.reduce(torch.stack([correct, correct.new_tensor(count)]))
        accuracy = int(both[0]) / max(1, int(both[1]))
        self._metrics["train" if model.training else "eval"]["mean_token_accuracy"].append(accuracy)
        if num_items_in_batch is None:
            return total / max(1, count)
        # The items are those of all ranks, and DDP takes the mean of the ranks' gradients.
        return total * self.args.world_size / max(1, int(num_items_in_batch))

    def join_tokens(self) -> None:
        """Add up what all ranks have seen; each of them calls it."""
        counts = torch.tensor([self.tokens_seen, self.supervised_tokens_seen], device=self.accelerator.device)
        tokens, supervised = self.accelerator.reduce(counts).tolist()
        self.tokens_of_all = (tokens, supervised)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the speed since the last time, and the memory, beside the loss."""
        if "loss" in logs:
            self.join_tokens()
            now, tokens = time.monotonic(), self.tokens_of_all[0]
            since, before = self._logged or (now, tokens)
            self._logged = (now, tokens)
            if now > since:
                logs["tokens_per_second"] = round((tokens - before) / (now - since), 1)
            logs["memory_bytes"] = peak_memory_bytes()
        super().log(logs, *args, **kwargs)

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """While this is entered, time does not count to the speed that is logged: it is not training."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self.seconds_off_the_clock += seconds
            if self._logged is not None:
                since, tokens = self._logged
                self._logged = (since + seconds, tokens)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Weigh the validation loss by trained tokens, so that it does not depend on how samples share batches."""
        self._validation = []
        with self.off_the_clock():
            output = super().evaluation_loop(*args, **kwargs)
        if self._validation and output.metrics is not None:
            sums = torch.tensor(self._validation, dtype=torch.float64).sum(0).to(self.accelerator.device)
            loss, count = self.accelerator.reduce(sums).tolist()
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss / max(1, count)
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.off_the_clock():
            self.save_whole(gather_random())

    def save_whole(self, random: list[dict[str, Any]]) -> None:
        """Write a checkpoint of the last step, whole or not at all, and remove old ones.

        Args:
            random: Random numbers of every process as they were then.

        Raises:
            UserError: Where it cannot be written.
        """
        checkpoints = Path(self.args.output_dir)
        folder = checkpoints / f"checkpoint-{self.state.global_step}"
        self._place_best()
        weights, optimizer = whole_weights(self.model), whole(self.optimizer.state_dict())
        about = {"step": self.state.global_step, **self.told_of_run, "processes": self.args.world_size}
        self.join_tokens()
        loss = mean_loss(self._tr_loss)
        if self.args.should_save:
            with written_whole(folder, about, state_bytes(self)) as staging:
                # Not `save_model`, which adds training_args.bin: a pickle, and it holds hub_token in clear.
                self.accelerator.unwrap_model(self.model).save_pretrained(staging, state_dict=weights)
                self.processing_class.save_pretrained(staging)
                (staging / "README.md").unlink(missing_ok=True)  # peft's empty model card
                save_trainer_state(self, staging, optimizer, random, loss)
                for name in (DATA_FILE, RECIPE_FILE):  # what it was trained on, and how
                    if (checkpoints.parent / name).is_file():
                        shutil.copyfile(checkpoints.parent / name, staging / name)
            remove_old(checkpoints, KEPT, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def save_last_step(self, save: bool = True) -> str:
        """After a failure in the middle of a step, leave a checkpoint of the one before.

        Args:
            save: Whether to try; else only what is there is told.

        Returns:
            What a person is told of it, to stand behind what failed.
        """
        newest, _ = newest_whole(Path(self.args.output_dir))
        reached = self.state.global_step
        alone = self.args.world_size == 1  # a failure is one process's alone: nothing can be gathered after it
        missing = newest is None or newest.name != f"checkpoint-{reached}"
        if save and alone and self._weights_whole and self._random_at_step is not None and missing:
            try:
                self.model.zero_grad(set_to_none=True)
                if self._at_rest is not None:  # what a broken step has counted is counted again
                    put_counters(self, self._at_rest)
                self.save_whole([self._random_at_step if self._at_rest is None else self._at_rest["random"]])
                newest = Path(self.args.output_dir, f"checkpoint-{reached}")
            except Exception as error:  # what failed first is what is told
                print(f"no checkpoint of step {reached} could be written: {error}", file=sys.stderr)
        return f"; go on with --resume, from {newest}" if newest else "; there is no checkpoint to go on from"

    def create_accelerator_and_postprocess(self) -> None:
        """Share weights out where that is asked for."""
        super().create_accelerator_and_postprocess()
        if is_sharded():
            share_out(self.accelerator)
            self.is_fsdp_enabled = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._resumed = restore_optimizer(self, Path(checkpoint), self.changed)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random(self._resumed, self.args.process_index)
            self._validate_what_is_due()

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: nothing here trains in float16."""

    def _load_best_model(self) -> None:
        run = self.identity.get("run", "")
        best = best_of_run(Path(self.args.output_dir), self.state.best_global_step, lambda each: is_of_run(each, run))
        if self.is_fsdp_enabled:
            load_weights(self.model, best)
        else:
            super()._load_best_model()

    @property
    def seconds(self) -> float:
        """Of training, without validating, scoring and saving, and with those before a resume."""
        return self.seconds_before + time.monotonic() - self._began - self.seconds_off_the_clock

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's says nothing true of a LLaVA; publishing writes ours."""
