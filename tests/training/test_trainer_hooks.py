"""The private methods of transformers' trainer that we override are in one place."""

from __future__ import annotations

from transformers import Trainer

from lora_llava.training.trainer import LlavaSFTTrainer
from lora_llava.training.trainer_hooks import TrainerHooks


def overridden(ours: type) -> set[str]:
    return {
        name for name in vars(ours) if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)
    }


def test_private_methods_are_overridden_in_one_class() -> None:
    assert overridden(LlavaSFTTrainer) == set()
    assert overridden(TrainerHooks) == {"_save_checkpoint", "_load_from_checkpoint", "_load_best_model"}
