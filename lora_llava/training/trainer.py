"""The trainer: TRL's `SFTTrainer` with our rows and collator, two learning rates, and an fp32 projector."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import SFTConfig

from lora_llava.distributed.sharding import full_weights, gather_full
from lora_llava.model.adapters import save_adapter, trained_projector
from lora_llava.model.fast_path.trained_loss import count_labels, labelled_loss
from lora_llava.recipe.io import RECIPE_FILE
from lora_llava.runs.checkpoint import atomic_checkpoint, newest_complete, remove_old
from lora_llava.runs.directory import DATA_FILE
from lora_llava.runs.state_files import random_state
from lora_llava.runs.trainer_state import (
    mean_loss,
    put_counters,
    restore_counters,
    restore_optimizer,
    restore_random,
    save_trainer_state,
    state_bytes,
    take_counters,
)
from lora_llava.training.feed import Feed, RowCollator, placeholder_dataset
from lora_llava.training.parameter_groups import Rates, parameter_groups
from lora_llava.training.trainer_hooks import TrainerHooks
from lora_llava.training.training_progress import peak_memory_bytes

KEPT = 2
"""Newest checkpoints that are kept beside the best one: the newest may turn out to be damaged."""


class _TrainerEvents(TrainerCallback):
    """Call the trainer back when training begins, before the weights change, and after a step and after the last one.

    Args:
        begin: Called once the trainer has reset its counters.
        change: Called before each optimizer step.
        step: Called after each step.
        end: Called after the last step has been logged, validated and saved.
    """

    def __init__(
        self,
        begin: Callable[[], None],
        change: Callable[[], None],
        step: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        self.begin, self.change, self.step, self.end = begin, change, step, end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.change()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end()


class LlavaSFTTrainer(TrainerHooks):
    """`SFTTrainer` for encoded LLaVA rows.

    Args:
        model: The PEFT model of `add_adapters`.
        args: From `training_arguments`.
        train: The feed of the training split.
        validation: The feed of the validation split, or None.
        processor: The stock processor; saved with every checkpoint.
        rates: Peak learning rates.
        callbacks: Added to the trainer's own.
    """

    def __init__(
        self,
        model: PeftModel,
        args: SFTConfig,
        *,
        train: Feed,
        validation: Feed | None,
        processor: Any,
        rates: Rates,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.rates = rates
        self._feeds = {"train": train, "validation": validation}
        self.tokens_seen = 0
        self.supervised_tokens_seen = 0
        self.tokens_of_all = (0, 0)
        self._validation: list[tuple[float, int]] = []
        self._logged: tuple[float, int] | None = None
        self.seconds_before, self.seconds_off_the_clock, self._began = 0.0, 0.0, time.monotonic()
        self.changed: tuple[str, ...] = ()
        self.manifest_entries: dict[str, Any] = {}
        self.identity: dict[str, Any] = {}
        self._resume_from: Path | None = None
        self._random_to_restore: dict[str, Any] | None = None
        self._random_at_step: dict[str, Any] | None = None
        self._after_step: dict[str, Any] | None = None
        self._weights_consistent = True
        self.overflows: list[int] = []
        self.on_loss: Callable[[torch.Tensor], None] = lambda loss: None
        self.on_begin: Callable[[], None] = lambda: None
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        events = _TrainerEvents(self._begin, self._weights_change, self._step_ended, self._take_counters)
        super().__init__(
            model=model,
            args=args,
            train_dataset=placeholder_dataset(train),
            eval_dataset=placeholder_dataset(validation) if validation else None,
            data_collator=train.collator,
            processing_class=processor,
            callbacks=[events, *callbacks],
        )
        self._restore_dtypes(trained)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train; see `Trainer.train`.

        Args:
            resume_from_checkpoint: The checkpoint to resume from, or None.
            **kwargs: The other arguments of `Trainer.train`.
        """
        self._resume_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _begin(self) -> None:
        if self._resume_from is not None:
            state = restore_optimizer(self, self._resume_from, self.changed)
            self._random_to_restore = state
            restore_counters(self, state)
            self.state.compute_steps(self.args, self.state.max_steps)  # the intervals of the present recipe
            self._place_best()
        self.on_begin()
        if self.state.global_step >= self.state.max_steps:
            self._validate_if_due()
        self._began, self.seconds_off_the_clock = time.monotonic(), 0.0

    def _weights_change(self) -> None:
        self._weights_consistent = False

    def _step_ended(self) -> None:
        self._weights_consistent, self._after_step, self._random_at_step = True, None, random_state()

    def _take_counters(self) -> None:
        self._after_step = take_counters(self)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of the next step.

        It is the trainer's first call after a step was logged, validated and saved, hence the counters are taken here.
        On a resumed run, the first call skips the rows that were trained; random numbers are restored after that.
        """
        self._take_counters()
        batches = super().get_batch_samples(*args, **kwargs)
        if self._random_to_restore is not None:
            restore_random(self._random_to_restore, self.args.process_index)
            self._random_to_restore = None
            self._validate_if_due()
            if self.control.should_training_stop:  # a run that was stopped early resumes to its end without a step
                return [], None
        return batches

    def _validate_if_due(self) -> None:
        """Validate a run that was stopped between a step and the validation due at that step."""
        state, history = self.state, self.state.log_history
        due = state.global_step % state.eval_steps == 0 or state.global_step >= state.max_steps
        known = any(each["step"] == state.global_step and "eval_loss" in each for each in history)
        if self.args.eval_strategy != "no" and due and not known:
            self.update_best(self.evaluate())
            self._place_best()

    def _place_best(self) -> None:
        """Point to the best checkpoint in this run's folder: the saved state may be from before the run was moved."""
        step = self.state.best_global_step
        best = Path(self.args.output_dir) / f"checkpoint-{step}"
        self.state.best_model_checkpoint = str(best) if step else None

    def _restore_dtypes(self, trained: dict[str, torch.Tensor]) -> None:
        """Undo SFTTrainer's cast of all trained weights to bf16 (trl/trainer/sft_trainer.py).

        AdamW's steps at a learning rate of 2e-5 are lost to rounding in bf16.
        """
        for name, parameter in self.model.named_parameters():
            if name in trained:
                parameter.data = trained[name]
        projector = trained_projector(self.accelerator.unwrap_model(self.model))
        wrong = [name for name, p in projector.named_parameters() if p.dtype != torch.float32]
        if wrong:
            raise RuntimeError(f"the projector's {wrong[0]} is not float32")

    def get_train_dataloader(self) -> Any:
        """Return the rows of the entire run in their planned order; a resumed run skips those it has trained on."""
        return self._loader("train")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the validation rows, with the images of that split."""
        return self._loader("validation")

    def _loader(self, split: str) -> Any:
        feed = self._feeds[split]
        assert feed is not None  # no validation split, no evaluation
        loader: Any = DataLoader(
            feed.samples,  # type: ignore[arg-type]
            batch_sampler=feed.rows[self.args.process_index :: self.args.world_size],
            collate_fn=RowCollator(feed.collator, feed.samples[0]),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        # Without accelerate's sharding, which repeats rows from the start if the ranks' shares differ in length.
        return prepare_data_loader(loader, self.accelerator.device, 1, 0, put_on_device=True, non_blocking=True)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer, whose groups have learning rates of their own."""
        optimizer: torch.optim.Optimizer | None = getattr(self, "optimizer", None)
        if optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = parameter_groups(self.model.named_parameters(), self.rates, self.args.weight_decay)
            optimizer = optimizer_class(groups, **options)
            self.optimizer = optimizer
        return optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Count the tokens and return the loss.

        It is not TRL's, which computes the logits of every token where Triton is missing, and reads a head that trains
        as a plain matrix, past PEFT's wrapper and its dtype (trl/trainer/utils.py, add_fused_lm_head).
        """
        count = count_labels(inputs)
        if model.training and count:  # a pass without labels only keeps the ranks in step
            padding = int((inputs["attention_mask"] == 0).sum()) if "attention_mask" in inputs else 0
            self.tokens_seen += inputs["input_ids"].numel() - padding
            self.supervised_tokens_seen += count
        loss = self._labelled_loss(model, inputs, count, kwargs.get("num_items_in_batch"))
        if not model.training:
            self._validation += [(float(loss) * count, count)]
            return loss
        self.on_loss(loss)
        return loss

    def _labelled_loss(self, model: Any, inputs: dict[str, Any], count: int, num_items_in_batch: Any) -> torch.Tensor:
        total, correct = labelled_loss(model, inputs)
        both = self.accelerator.reduce(torch.stack([correct, correct.new_tensor(count)]))
        accuracy = int(both[0]) / max(1, int(both[1]))
        self._metrics["train" if model.training else "eval"]["mean_token_accuracy"].append(accuracy)
        if num_items_in_batch is None:
            return total / max(1, count)
        # `num_items_in_batch` counts all ranks, and DDP averages the gradients over ranks.
        return total * self.args.world_size / max(1, int(num_items_in_batch))

    def join_tokens(self) -> None:
        """Sum the token counts over all ranks; every rank must call it."""
        counts = torch.tensor([self.tokens_seen, self.supervised_tokens_seen], device=self.accelerator.device)
        tokens, supervised = self.accelerator.reduce(counts).tolist()
        self.tokens_of_all = (tokens, supervised)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the loss, the recipe's learning rate, the tokens per second since the last log, and the peak memory."""
        if "loss" in logs:
            self.join_tokens()
            now, tokens = time.monotonic(), self.tokens_of_all[0]
            since, before = self._logged or (now, tokens)
            self._logged = (now, tokens)
            if now > since:
                logs["tokens_per_second"] = round((tokens - before) / (now - since), 1)
            logs["memory_bytes"] = peak_memory_bytes()
        if "learning_rate" in logs:  # stock: of the first group, which is the projector's or the vision tower's
            optimizer: Any = self.optimizer
            logs["learning_rate"] *= self.args.learning_rate / optimizer.param_groups[0]["initial_lr"]
        if not math.isfinite(logs.get("grad_norm", 0.0)):  # of a step that overflowed in float16: not JSON
            del logs["grad_norm"]
        super().log(logs, *args, **kwargs)

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Exclude the time of a `with` block from the logged speed: it is not training."""
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
        """Average the validation loss over trained tokens, so that it does not depend on the batches."""
        self._validation = []
        with self.off_the_clock():
            output = super().evaluation_loop(*args, **kwargs)
        if self._validation and output.metrics is not None:
            sums = torch.tensor(self._validation, dtype=torch.float64).sum(0).to(self.accelerator.device)
            loss, count = self.accelerator.reduce(sums).tolist()
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss / max(1, count)
        return output

    def save_checkpoint(self, random: list[dict[str, Any]]) -> None:
        """Write a checkpoint of the last step, completely or not at all, and remove old ones.

        Args:
            random: The random state of every process after that step.

        Raises:
            UserError: If it cannot be written.
        """
        with self.off_the_clock():
            self._write_checkpoint(random)

    def _write_checkpoint(self, random: list[dict[str, Any]]) -> None:
        checkpoints = Path(self.args.output_dir)
        folder = checkpoints / f"checkpoint-{self.state.global_step}"
        self._place_best()
        # Every rank takes part in gathering; the first one writes.
        weights, optimizer = full_weights(self.model), gather_full(self.optimizer.state_dict())
        about = {"step": self.state.global_step, **self.manifest_entries, "processes": self.args.world_size}
        self.join_tokens()
        loss = mean_loss(self._tr_loss)
        if self.args.should_save:
            with atomic_checkpoint(folder, about, state_bytes(self)) as staging:
                # Not `save_model`: it adds training_args.bin, a pickle that contains hub_token in plain text.
                save_adapter(self.accelerator.unwrap_model(self.model), staging, weights)
                self.processing_class.save_pretrained(staging)
                save_trainer_state(self, staging, optimizer, random, loss)
                for name in (DATA_FILE, RECIPE_FILE):
                    if (checkpoints.parent / name).is_file():
                        shutil.copyfile(checkpoints.parent / name, staging / name)
            remove_old(checkpoints, KEPT, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def save_last_step(self, save: bool = True) -> str:
        """Write a checkpoint of the last step after a failure in the middle of the next one.

        Args:
            save: Whether to write one; otherwise only report the newest.

        Returns:
            The end of an error message: where to resume from.
        """
        newest, _ = newest_complete(Path(self.args.output_dir))
        reached = self.state.global_step
        alone = self.args.world_size == 1  # one rank fails alone: the others would wait forever in a gather
        missing = newest is None or newest.name != f"checkpoint-{reached}"
        if save and alone and self._weights_consistent and self._random_at_step is not None and missing:
            try:
                self.model.zero_grad(set_to_none=True)
                if self._after_step is not None:  # the resumed run counts the failed step again
                    put_counters(self, self._after_step)
                random = self._random_at_step if self._after_step is None else self._after_step["random"]
                self._write_checkpoint([random])
                newest = Path(self.args.output_dir, f"checkpoint-{reached}")
            except Exception as error:  # the first failure is the one that is raised
                print(f"no checkpoint of step {reached} could be written: {error}", file=sys.stderr)
        return f"; resume with --resume, from {newest}" if newest else "; no checkpoint exists to resume from"

    @property
    def seconds(self) -> float:
        """Seconds of training without validation, evaluation and saving, including those before a resume."""
        return self.seconds_before + time.monotonic() - self._began - self.seconds_off_the_clock

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's card does not describe a LLaVA; publishing writes ours."""
