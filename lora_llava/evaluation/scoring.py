"""Evaluation within a training run: tables before and after it, and scores of validation rows during it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from lora_llava.data.conversation import Conversation
from lora_llava.distributed.ranks import is_first
from lora_llava.evaluation.answer_metrics import EXACT, METRICS
from lora_llava.evaluation.answerers import Evaluator, by_generation, by_likelihood, reference_losses, split_over_ranks
from lora_llava.evaluation.answers import AnswerTable, is_answer_table
from lora_llava.evaluation.compare.compare_files import read_predictions
from lora_llava.evaluation.figures.majority import MOST_ROWS, AnswerCount, MajorityAnswers, count_row_answers
from lora_llava.evaluation.figures.run_figures import AFTER, BEFORE, WEIGHED, ShuffledImages, build_figures
from lora_llava.evaluation.row_evaluation import (
    choose_rows,
    evaluate_conversations,
    evaluate_scienceqa,
    shuffle_images,
    write_predictions,
)
from lora_llava.evaluation.scienceqa import Table
from lora_llava.inference.likelihood import build_tree
from lora_llava.inference.sampling import Sampling
from lora_llava.model.families.image_counts import tokens_of
from lora_llava.planning.run_plan import RunPlan
from lora_llava.recipe import EvaluationSection
from lora_llava.splits.split_rows import Split, asked_split

WEIGHED_FILE = "predictions_before_likelihood.jsonl"
SHUFFLED_FILE = "predictions_after_shuffled.jsonl"
_LEAST_SHUFFLED, _MOST_SHUFFLED = 40, 400


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


def training_answers(plan: RunPlan) -> MajorityAnswers | None:
    """Count the answers of a run's training rows, before they are trained on.

    Returns:
        The counts; None if the run evaluates no own rows.
    """
    settings, train = plan.recipe.evaluation, plan.splits.get("train")
    if settings is None or train is None or not _is_own(plan) or not (settings.before or settings.after):
        return None
    return count_row_answers(train.read(choose_rows(range(len(train.rows)), MOST_ROWS, plan.recipe.seed)))


def weigh_few_answers(
    model: Any, plan: RunPlan, before: EvaluationResult | None, majority: MajorityAnswers | None
) -> None:
    """Answer the questions of few answers by likelihood, before training, and write the predictions file.

    A base that was never taught the form of the answers writes long ones, which count as wrong. Likelihood shows what
    it knows. The other questions keep their generated answers.

    Args:
        model: The model before training.
        plan: The plan of the run.
        before: Its generated answers; None if the recipe asks for none.
        majority: The training rows' answers, which are the choices.
    """
    file = Path(plan.recipe.output_dir) / WEIGHED_FILE
    if is_first():
        file.unlink(missing_ok=True)
    if before is None or majority is None or not _is_own(plan):
        return
    evaluator = _evaluator(model, plan, before.split)
    choices = few_choices(evaluator, before.rows, majority)
    places = [place for place, texts in enumerate(choices) if texts]
    if not places:
        return
    rows = [
        replace(before.rows[place], extra={**before.rows[place].extra, "choices": choices[place]}) for place in places
    ]
    answerer = split_over_ranks(by_likelihood(evaluator, lambda row, _: row.extra["choices"]))
    _, weighed = evaluate_conversations(rows, answerer, predictions=None, description="before training, by likelihood")
    found = dict(zip(places, weighed, strict=True))
    if is_first():
        write_predictions(file, [found.get(place, line) for place, line in enumerate(before.scored)])


def few_choices(
    evaluator: Evaluator, rows: Sequence[Conversation], majority: MajorityAnswers
) -> list[tuple[str, ...] | None]:
    """Return the answers that likelihood may choose from, for each row; None where they are many."""

    @cache
    def choices(group: AnswerCount, place: int) -> tuple[str, ...] | None:
        texts = tuple(answer for answer, _ in group.answers)
        if not group.few or len(texts) < 2 or not all(texts):
            return None
        try:
            build_tree([evaluator.with_answer(rows[place], text)[0] for text in texts])
        except ValueError:  # tokens that cannot be distinguished
            return None
        return texts

    groups = [majority.group(row.extra.get("type"), row.turns[-2].words) for row in rows]
    first = {group: place for place, group in reversed(list(enumerate(groups)))}
    return [choices(group, first[group]) for group in groups]


def run_figures(
    model: Any, plan: RunPlan, after: EvaluationResult | None, majority: MajorityAnswers | None
) -> dict[str, Any] | None:
    """Compute the figures beside the scores of a run; answers some rows again with their images shuffled.

    Args:
        model: The trained model.
        plan: The plan of the run; its directory has the predictions before training, if there are any.
        after: The answers after training; None if the recipe asks for none.
        majority: From `training_answers`.

    Returns:
        See `build_figures`; None for ScienceQA, and without answers after training.
    """
    if after is None or not _is_own(plan):
        return None
    shuffled = _shuffle_run(model, plan, after)
    folder, answers = Path(plan.recipe.output_dir), {}
    settings = plan.recipe.evaluation or EvaluationSection()
    for name, file in ((BEFORE, "predictions_before.jsonl"), (WEIGHED, WEIGHED_FILE)):
        if settings.before and is_first() and (folder / file).is_file():
            answers[name] = read_predictions(folder / file)[1]
    return build_figures({**answers, AFTER: after.scored}, after.rows, majority, shuffled)


def _shuffle_run(model: Any, plan: RunPlan, after: EvaluationResult) -> ShuffledImages | None:
    share = (plan.recipe.evaluation or EvaluationSection()).shuffled
    if not share or not any(row.images for row in after.rows):
        return None
    places, rows = rows_to_shuffle(after.rows, share, plan.recipe.seed)
    file = Path(plan.recipe.output_dir) / SHUFFLED_FILE
    if not rows:
        return ShuffledImages(share, places, [])
    found = _evaluate(model, plan, after.split, rows, file, "after training, images shuffled")
    return ShuffledImages(share, places, found.scored)


def rows_to_shuffle(rows: Sequence[Conversation], share: float, seed: int) -> tuple[list[int], list[Conversation]]:
    """Choose rows with images and give each the images of another row.

    Args:
        rows: The evaluated rows.
        share: Share of the rows with images; at least `_LEAST_SHUFFLED` where there are as many, and at most
            `_MOST_SHUFFLED`.
        seed: Seed of choice and shuffle.

    Returns:
        The indices of the chosen rows, and the rows with other images. A row that no other images could be given to is
        left out.
    """
    seen = [place for place, row in enumerate(rows) if row.images]
    count = min(_MOST_SHUFFLED, max(_LEAST_SHUFFLED, math.ceil(share * len(seen))))
    chosen = choose_rows(seen, count, seed)
    shuffled = shuffle_images([rows[place] for place in chosen], seed)
    changed = [(i, row) for i, row in zip(chosen, shuffled, strict=True) if row.images != rows[i].images]
    return [place for place, _ in changed], [row for _, row in changed]


def _is_own(plan: RunPlan) -> bool:
    return plan.recipe.data.format == "conversations"


def _evaluator(model: Any, plan: RunPlan, split: Split) -> Evaluator:
    size = (plan.recipe.evaluation or EvaluationSection()).batch_size
    tokens = tokens_of(plan.model.config, split.sizes)
    return Evaluator(model, plan.tokenizer, plan.template, tokens, split.load_pixels, size)


def _evaluate(
    model: Any, plan: RunPlan, split: Split, rows: list[Conversation], predictions: Path | None, description: str
) -> EvaluationResult:
    settings = plan.recipe.evaluation or EvaluationSection()
    evaluator = _evaluator(model, plan, split)
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
