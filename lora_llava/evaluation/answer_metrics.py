"""Metrics of free answers. `METRICS` is their one definition.

Predictions files, tables in the terminal, the report page, `compare`, the `evaluate` metric `AnswerMatch` and the model
card all read `METRICS`. To add a metric, add one entry here. Runs that were saved before the metric existed stay
readable: the new column is left out or shows a dash.

Answers are compared by the tokens of `lora_llava.evaluation.parsing.normal`, whose docstring states the rule.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from lora_llava.evaluation.parsing.normal import CJK, answer_tokens

DASH = "–"
"""Shown for a value that does not exist, such as a score of no questions."""
_WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")


def exact_match(prediction: str, reference: str) -> bool:
    """Check whether two answers have the same tokens."""
    return answer_tokens(prediction) == answer_tokens(reference)


def token_f1(prediction: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over words, numbers and CJK characters.

    Returns:
        From 0 to 1. Two texts without any word score 1.
    """
    ours, theirs = answer_tokens(prediction), answer_tokens(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def rouge_l(prediction: str, reference: str) -> float:
    """Return the F-measure over the longest common subsequence of words (Lin 2004), by rouge_score, without stemming.

    Returns:
        From 0 to 1; 0 if either text has no word.
    """
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):  # rouge_score's own tokenizer drops every letter beyond a to z
        def tokenize(self, text: str) -> list[str]:
            return _WORD.findall(unicodedata.normalize("NFKC", text).lower())

    return RougeScorer(["rougeL"], tokenizer=Words())


@dataclass(frozen=True)
class Metric:
    """A metric of free answers.

    Attributes:
        key: Its key in a line of a predictions file.
        title: Its name in column headings.
        function: Scores a prediction against a reference, from 0 to 1, or as a bool. None if the model itself yields
            the value, such as the loss; such a metric is shown neither by `compare` nor on the model card.
        higher_is_better: Whether a high value is good.
        group_key: Its key in the scores of a group (`metrics.json`, `evaluation.json`); by default `key`.
        definition: Its name and definition for the model card; by default `title`.
        unit: Follows the title in a heading, as in "F1 in %"; "" for no unit.
        scale: Factor from the value of a row to that of a group.
        decimals: Digits after the point in saved and shown group scores.
        binary: Whether the value of a row is true or false. Group scores then get a 95% interval.
        weight_key: Key of a row's weight in the group mean; "" weighs all rows alike.
        required: Whether every saved run has it. False for a metric that was added later.
    """

    key: str
    title: str
    function: Callable[[str, str], float] | None
    higher_is_better: bool = True
    group_key: str = ""
    definition: str = ""
    unit: str = "%"
    scale: float = 100.0
    decimals: int = 2
    binary: bool = False
    weight_key: str = ""
    required: bool = False

    @property
    def saved_as(self) -> str:
        """The key in the scores of a group."""
        return self.group_key or self.key

    @property
    def heading(self) -> str:
        """Title and unit, for a column."""
        return f"{self.title} in {self.unit}" if self.unit else self.title

    @property
    def worst(self) -> float:
        """The value of a row without an answer."""
        value = 0.0 if self.higher_is_better else 1.0
        return bool(value) if self.binary else value

    def is_valid(self, value: Any) -> bool:
        """Check whether a value read from a predictions file is one of this metric."""
        return isinstance(value, bool) if self.binary else isinstance(value, int | float) and 0 <= value <= 1

    def mean(self, rows: Sequence[Mapping[str, Any]]) -> float | None:
        """Average over the rows of a group.

        Returns:
            The scaled and rounded mean. Without rows 0. For a metric of the model, None if a row lacks the value.
        """
        if self.function is None and not all(self.key in row for row in rows):
            return None
        weights = [row[self.weight_key] if self.weight_key else 1 for row in rows]
        total = sum(row[self.key] * weight for row, weight in zip(rows, weights, strict=True))
        if self.function is None and not sum(weights):
            return None
        return round(self.scale * total / max(1, sum(weights)), self.decimals)

    def cell(self, scores: Mapping[str, Any]) -> str:
        """Format the score of a group for a table.

        Args:
            scores: The group's, with the key `questions`.

        Returns:
            The number; for no questions or a score that was not saved a dash; for a missing loss nothing.
        """
        value = scores.get(self.saved_as)
        if self.function is None:
            return "" if value is None else f"{value:.{self.decimals}f}"
        return DASH if value is None or not scores["questions"] else f"{value:.{self.decimals}f}"


EXACT = "exact"
"""Key of the metric that decides whether an answer is right."""
METRICS = {
    metric.key: metric
    for metric in (
        Metric(
            EXACT,
            "exact match",
            exact_match,
            group_key="exact_match",
            definition="exact match (SQuAD's rule)",
            binary=True,
            required=True,
        ),
        Metric("f1", "F1", token_f1, definition="word F1 (SQuAD's rule)", required=True),
        Metric("rouge_l", "ROUGE-L", rouge_l),
        Metric(
            "loss",
            "loss",
            None,
            higher_is_better=False,
            unit="",
            scale=1.0,
            decimals=4,
            weight_key="loss_tokens",
            required=True,
        ),
    )
}
"""By key, in the order of the columns. Exact match and F1 are SQuAD's (arXiv 1606.05250, section 6.1). The loss is the
cross-entropy of the reference in nats per token."""


def text_metrics() -> list[Metric]:
    """Return the metrics that are computed from prediction and reference alone."""
    return [metric for metric in METRICS.values() if metric.function is not None]


def text_scores(prediction: str, reference: str) -> dict[str, Any]:
    """Score a prediction against a reference.

    Returns:
        The value of each of `text_metrics` by key.
    """
    return {metric.key: metric.function(prediction, reference) for metric in text_metrics() if metric.function}


def worst_scores() -> dict[str, Any]:
    """Return the scores of a question that got no answer, by key."""
    return {metric.key: metric.worst for metric in text_metrics()}


def group_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average every metric over rows.

    Returns:
        The means by `Metric.saved_as`, and `questions`, the number of rows.
    """
    return {metric.saved_as: metric.mean(rows) for metric in METRICS.values()} | {"questions": len(rows)}
