"""Metrics for the `evaluate` library; `ScienceQAAccuracy().compute(...)` needs neither network nor model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from lora_llava.evaluation.answer_metrics import group_scores, text_metrics, text_scores
from lora_llava.evaluation.scienceqa import COLUMNS, Prediction, parse_answer, score

_CITATION = """@inproceedings{lu2022learn, title={Learn to Explain: Multimodal Reasoning via Thought Chains for Science
Question Answering}, author={Lu, Pan and others}, booktitle={NeurIPS}, year={2022}}"""


class _Metric(evaluate.Metric):  # type: ignore[misc]
    """A metric that stays in memory: it writes no file and downloads nothing."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **kwargs})


class ScienceQAAccuracy(_Metric):
    """Accuracy in % over ScienceQA's columns, with answers parsed by LLaVA's rule (`parse_answer`).

    `compute(predictions=texts, references=questions)`: texts are the answers; a question is `{"answer": index,
    "num_choices": count, "categories": columns}`. Columns come from `lora_llava.evaluation.scienceqa.categories`
    or are empty.

    Returns:
        `accuracy`; each of the nine columns that has questions; `unparsed`, the share in % of texts without a choice.

    Raises:
        ValueError: If a category is not one of the columns.
    """

    def _info(self) -> evaluate.MetricInfo:
        question = {
            "answer": datasets.Value("int32"),
            "num_choices": datasets.Value("int32"),
            "categories": datasets.List(datasets.Value("string")),
        }
        return evaluate.MetricInfo(
            description="Accuracy on ScienceQA (arXiv 2209.09513).",
            citation=_CITATION,
            inputs_description=str(ScienceQAAccuracy.__doc__),
            features=datasets.Features({"predictions": datasets.Value("string"), "references": question}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[dict[str, Any]]) -> dict[str, float]:
        known = COLUMNS[1:]
        unknown = [name for question in references for name in question["categories"] if name not in known]
        if unknown:
            raise ValueError(f"categories: {unknown[0]!r} is unknown; use those of {', '.join(known)}")
        table = score(
            Prediction(
                question_id=str(number),
                text=text,
                prediction=parse_answer(text, question["num_choices"]),
                answer=question["answer"],
                categories=list(question["categories"]),
            )
            for number, (text, question) in enumerate(zip(predictions, references, strict=True))
        )
        columns = {column: table[column][0] for column in COLUMNS[1:] if table[column][2]}
        unparsed = round(100 * table["unparsed"] / max(1, len(predictions)), 2)
        return {"accuracy": table["AVG"][0], **columns, "unparsed": unparsed}


class AnswerMatch(_Metric):
    """Metrics of free answers in %: exact match, word F1 (SQuAD's), ROUGE-L and any other text metric of `METRICS`.

    `compute(predictions=texts, references=texts)`.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Agreement of free answers with their references.",
            citation="",
            inputs_description=str(AnswerMatch.__doc__),
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        scores = group_scores([text_scores(*pair) for pair in zip(predictions, references, strict=True)])
        return {metric.saved_as: scores[metric.saved_as] for metric in text_metrics()}
