"""The trainer: TRL's `SFTTrainer` with our rows and collator, two learning rates, and an fp32 projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.model.adapters import trained_projector


class LlavaSFTTrainer(SFTTrainer):
    """`SFTTrainer` for encoded LLaVA rows.

    Args:
        model: The PEFT model of `add_adapters`.
        args: From `stages.training_arguments`.
        train_dataset: Rows with `input_ids`, `labels`, `image_files`, `length`.
        eval_dataset: The same of the validation split, or None.
        collator: Makes batches.
        processor: The stock processor; saved with every checkpoint.
        projector_learning_rate: Peak rate of the projector.
        callbacks: Added to the trainer's own.
    """

    def __init__(
        self, model: PeftModel, args: SFTConfig, *, train_dataset: Dataset, eval_dataset: Dataset | None, collator: Any,
        processor: Any, projector_learning_rate: float, callbacks: list[TrainerCallback],
    ) -> None:  # fmt: skip
        self.projector_learning_rate = projector_learning_rate
        self.tokens_seen = 0
        self.supervised_tokens_seen = 0
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, data_collator=collator,
            processing_class=processor, callbacks=callbacks,
        )  # fmt: skip
        self._restore_dtypes(trained)

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
        """Count tokens on the way to TRL's loss."""
        if model.training:
            padding = int((inputs["attention_mask"] == 0).sum()) if "attention_mask" in inputs else 0
            self.tokens_seen += inputs["input_ids"].numel() - padding
            self.supervised_tokens_seen += int((inputs["labels"] != IGNORE_INDEX).sum())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and it holds hub_token in clear

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's says nothing true of a LLaVA; publishing writes ours."""
