"""Evaluation within a training run: tables before and after it, and scores of validation rows during it."""

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
from lora_llava.evaluation.answerers import Evaluator, by_generation, reference_losses, split_over_ranks
from lora_llava.evaluation.answers import AnswerTable, is_answer_table
from lora_llava.evaluation.row_evaluation import choose_rows, evaluate_conversations, evaluate_scienceqa
from lora_llava.evaluation.scienceqa import Table
from lora_llava.inference.sampling import Sampling
from lora_llava.model.families.tower_families import image_tokens
from lora_llava.planning.run_plan import RunPlan
from lora_llava.recipe import EvaluationSection
from lora_llava.splits.split_rows import Split, asked_split


@dataclass(frozen=True)
class EvaluationResult:
    """A table and the answers it was computed from.

    Attributes:
        table: The scores.
        rows: The evaluated rows.
        scored: The scored answers, in the order of the rows.
        split: The split of the rows.
    """

    table: Table | AnswerTable
    rows: list[Conversation]
    scored: list[Any]
    split: Split


def evaluate_run(model: Any, plan: RunPlan, when: str) -> EvaluationResult | None:
    """Evaluate a model on the held-out rows of its run, and write the predictions file.

    Args:
        model: The model in its present state.
        plan: The plan of the run.
        when: `before` or `after`.

    Returns:
        The result; None if the recipe asks for no evaluation at that time.
    """
    count = getattr(plan.recipe.evaluation, when, 0)
    if count == 0:
        return None
    split = plan.splits[asked_split(plan.splits) or "test"]
    rows = split.read(choose_rows(range(len(split.rows)), count, plan.recipe.seed))
    file = Path(plan.recipe.output_dir) / f"predictions_{when}.jsonl"
    return _evaluate(model, plan, split, rows, file, f"table {when} training")


def _evaluate(
    model: Any, plan: RunPlan, split: Split, rows: list[Conversation], predictions: Path | None, description: str
) -> EvaluationResult:
    settings = plan.recipe.evaluation or EvaluationSection()
    evaluator = Evaluator(
        model, plan.tokenizer, plan.template, image_tokens(plan.model.config), split.load_pixels, settings.batch_size
    )
    answerer = split_over_ranks(by_generation(evaluator, Sampling(max_new_tokens=settings.max_new_tokens)))
    predictions = predictions if is_first() else None
    if plan.recipe.data.format == "scienceqa":
        table, scored = evaluate_scienceqa(
            rows, answerer, predictions=predictions, description=description, parser=settings.parser
        )
        return EvaluationResult(table, rows, scored, split)
    answers, lines = evaluate_conversations(
        rows, answerer, lambda: reference_losses(evaluator, rows), predictions=predictions, description=description
    )
    return EvaluationResult(answers, rows, lines, split)


class ScoreValidation(TrainerCallback):
    """Score some validation rows every `evaluation.generate_every` steps, without any effect on training.

    Args:
        plan: The plan of the run.
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
                found = _evaluate(
                    model, self.plan, self.split, self.rows, None, f"step {state.global_step}: validation"
                )
            finally:
                model.train(training)
                torch.set_rng_state(random)
        name, score = headline(found.table)
        if self.trainer is not None:
            logs = control.should_log
            Trainer.log(self.trainer, {"validation_score": score})  # TRL's own log would also reset its running means
            control.should_log = logs  # the loss of this step is logged later
        line = f"step {state.global_step}: {name} {score:.2f}% of {len(self.rows)} validation rows"
        if is_first():
            tqdm.write(line, file=sys.stderr)


def headline(table: Table | AnswerTable) -> tuple[str, float]:
    """Return the name and the value of a table's main score."""
    found: dict[str, Any] = dict(table)
    if is_answer_table(found):
        metric = METRICS[EXACT]
        return metric.title, float(found["all"][metric.saved_as])
    return "accuracy", float(found["AVG"][0])
