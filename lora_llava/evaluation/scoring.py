"""Asking a model: the tables before and after training, and a slice of the validation rows on the way."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from lora_llava.data.conversation import Conversation
from lora_llava.distributed.ranks import is_first
from lora_llava.evaluation.answer_metrics import EXACT, METRICS
from lora_llava.evaluation.answerers import Asked, by_writing, reference_losses, shared
from lora_llava.evaluation.answers import AnswerTable, is_answer_table
from lora_llava.evaluation.ask import ask_conversations, ask_scienceqa, choose_rows
from lora_llava.evaluation.scienceqa import Table
from lora_llava.inference.sampling import Sampling
from lora_llava.planning.run_plan import RunPlan
from lora_llava.recipe import EvaluationSection
from lora_llava.splits.split_rows import Split, asked_split


@dataclass(frozen=True)
class Asking:
    """What a table came of.

    Attributes:
        table: The scores.
        rows: What was asked.
        marked: The marked answers, in the rows' order.
        split: Where the rows are from.
    """

    table: Table | AnswerTable
    rows: list[Conversation]
    marked: list[Any]
    split: Split


def ask_table(model: Any, plan: RunPlan, when: str) -> Asking | None:
    """Ask the held-back rows, and write the answers.

    Args:
        model: As it is now.
        plan: The run's.
        when: `before` or `after`.

    Returns:
        What came of it; None where the recipe asks nothing then.
    """
    count = getattr(plan.recipe.evaluation, when, 0)
    if count == 0:
        return None
    split = plan.splits[asked_split(plan.splits) or "test"]
    rows = split.read(choose_rows(range(len(split.rows)), count, plan.recipe.seed))
    file = Path(plan.recipe.output_dir) / f"predictions_{when}.jsonl"
    return _ask(model, plan, split, rows, file, f"table {when} training")


def _ask(
    model: Any, plan: RunPlan, split: Split, rows: list[Conversation], predictions: Path | None, description: str
) -> Asking:  # fmt: skip
    settings = plan.recipe.evaluation or EvaluationSection()
    asked = Asked(
        model, plan.tokenizer, plan.template, plan.model.config.image_seq_length, split.load_pixels, settings.batch_size
    )
    answerer = shared(by_writing(asked, Sampling(max_new_tokens=settings.max_new_tokens)))
    predictions = predictions if is_first() else None
    if plan.recipe.data.format == "scienceqa":
        table, marked = ask_scienceqa(
            rows, answerer, predictions=predictions, description=description, parser=settings.parser
        )
        return Asking(table, rows, marked, split)
    answers, lines = ask_conversations(
        rows, answerer, lambda: reference_losses(asked, rows), predictions=predictions, description=description
    )
    return Asking(answers, rows, lines, split)


class ScoreValidation(TrainerCallback):
    """Lets the model answer a slice of the validation rows every so many steps; training goes on as if it had not.

    Args:
        plan: The run's; its recipe says how often and how many.
    """

    def __init__(self, plan: RunPlan) -> None:
        evaluation = plan.recipe.evaluation or EvaluationSection()
        split = plan.splits["validation"]
        self.plan, self.every, self.split = plan, evaluation.generate_every, split
        self.trainer: Any = None
        self.rows = split.read(choose_rows(range(len(split.rows)), evaluation.generate_rows, plan.recipe.seed))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.every is None or state.global_step % self.every:
            return
        training, random = model.training, torch.get_rng_state()
        with self.trainer.off_the_clock() if self.trainer is not None else nullcontext():
            try:
                found = _ask(model, self.plan, self.split, self.rows, None, f"step {state.global_step}: validation")
            finally:
                model.train(training)
                torch.set_rng_state(random)
        name, score = headline(found.table)
        if self.trainer is not None:
            logs = control.should_log
            Trainer.log(self.trainer, {"validation_score": score})  # TRL's own would also end its running means
            control.should_log = logs  # the step's own loss is still to come
        told = f"step {state.global_step}: {name} {score:.2f}% of {len(self.rows)} validation rows"
        if is_first():
            tqdm.write(told, file=sys.stderr)


def headline(table: Table | AnswerTable) -> tuple[str, float]:
    """A table's one figure, and its name."""
    found: dict[str, Any] = dict(table)
    if is_answer_table(found):
        metric = METRICS[EXACT]
        return metric.title, float(found["all"][metric.saved_as])
    return "accuracy", float(found["AVG"][0])
