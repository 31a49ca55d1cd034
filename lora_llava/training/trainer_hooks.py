"""The private methods of transformers' `Trainer` that our trainer overrides, each with the reason.

Checked against transformers 5.24 and trl 1.16. The other steps go through public ways: the optimizer, the random
numbers and the counters of a checkpoint come back in `on_train_begin` and `get_batch_samples`, since the stock methods
load nothing where their own files (`optimizer.pt`, `rng_state.pth`, `scaler.pt`) are missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from lora_llava.distributed.sharding import configure_sharding, is_sharded, load_weights
from lora_llava.runs.checkpoint import best_of_run
from lora_llava.runs.identity import is_of_run
from lora_llava.runs.trainer_state import gather_random


class TrainerHooks(SFTTrainer):
    """`SFTTrainer` with our checkpoints in place of its own."""

    identity: dict[str, Any]

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, with FSDP if it was requested, and with float16 on a CPU too."""
        super().create_accelerator_and_postprocess()
        if is_sharded():
            configure_sharding(self.accelerator)
            self.is_fsdp_enabled = True
        if self.args.fp16 and self.accelerator.device.type == "cpu":  # accelerate has it on other devices only
            self.accelerator.native_amp, self.accelerator.scaler = True, torch.amp.GradScaler("cpu")

    def save_checkpoint(self, random: list[dict[str, Any]]) -> None:
        """Write a checkpoint of the last step.

        Args:
            random: The random state of every process after that step.
        """
        raise NotImplementedError

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Why: a checkpoint must be written completely or not at all, and without pickles.
        # Public ways: `save_model` covers the weights only, and `on_save` is called once all files are written.
        self.save_checkpoint(gather_random())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Why: with FSDP the stock method reads accelerate's own files, which our checkpoints do not have.
        # Public ways: none; `train(resume_from_checkpoint=...)` always calls it.
        if self.is_fsdp_enabled:
            load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        # Why: a missing, damaged or foreign best checkpoint must stop the run; the stock method only warns.
        # Public ways: none; the stock method runs before `on_train_end`, and without `load_best_model_at_end` the
        # loading itself is private too.
        run = self.identity.get("run", "")
        best = best_of_run(Path(self.args.output_dir), self.state.best_global_step, lambda each: is_of_run(each, run))
        if self.is_fsdp_enabled:
            load_weights(self.model, best)
        else:
            super()._load_best_model()

    def update_best(self, metrics: dict[str, float]) -> None:
        """Record the step as the best one if its validation loss is the lowest.

        Args:
            metrics: From `evaluate`.
        """
        # Why: `evaluate` alone does not compare the losses. Public ways: none.
        self._determine_best_metric(metrics=metrics, trial=None)
