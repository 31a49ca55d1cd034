"""A model class for lmms-eval, whose questions are asked by `TaskAsker`. Imported only where lmms-eval is installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model

from lora_llava.core.errors import UserError
from lora_llava.evaluation.lmms.task_questions import TaskAsker, TaskQuestion, read_settings


@register_model("lora_llava")
class LmmsModel(lmms):
    """The model of an `TaskAsker`, as lmms-eval's tasks ask it.

    Args:
        asker: Asks the questions.
    """

    is_simple = True

    def __init__(self, asker: TaskAsker) -> None:
        super().__init__()
        self.asker = asker

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer questions, those of one task and one setting together."""
        groups: dict[tuple[str, str], list[int]] = {}
        for index, request in enumerate(requests):
            _, settings, _, _, task, _ = request.args
            groups.setdefault((task, json.dumps(settings, sort_keys=True, default=str)), []).append(index)
        answers: dict[int, str] = {}
        for (task, _), indices in groups.items():
            asked = [requests[index].args for index in indices]
            questions = [self._question(text, *rest) for text, _, *rest in asked]
            found = self.asker.generate(task, questions, read_settings(asked[0][1]))
            answers |= dict(zip(indices, found, strict=True))
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Compute the loss of given answers, those of one task together.

        Despite the method's name, it is the mean loss of the answer's tokens: lmms-eval's own models return that, and
        its tasks choose the lowest (`ConfigurableTask.process_results`). A bare pair would arrive there as text
        (`unwrap_generation_output` of 0.7.3); what is in a `GenerationResult` does not.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            if len(request.args) != 6:  # mutual information: answers without a question
                raise UserError(f"{request.task_name}: the loss of answers without a question is not computed here")
            groups.setdefault(request.args[4], []).append(index)
        found: dict[int, GenerationResult] = {}
        for task, indices in groups.items():
            questions = []
            for text, answer, visual, doc_id, _, split in (requests[index].args for index in indices):
                given = answer(self.task_dict[task][split][doc_id]) if callable(answer) else answer
                questions.append(self._question(text, visual, doc_id, task, split, str(given)))
            pairs = map(GenerationResult, self.asker.losses(task, questions))
            found |= dict(zip(indices, pairs, strict=True))
        return [found[index] for index in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse tasks of several rounds.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{requests[0].task_name} asks in several rounds, which is not done here; leave it out")

    def _question(self, text: str, visual: Any, doc_id: Any, task: str, split: str, answer: str = "") -> TaskQuestion:
        return TaskQuestion(str(doc_id), text, partial(self._images, visual, task, split, doc_id), answer)

    def _images(self, visual: Any, task: str, split: str, doc_id: Any) -> Any:
        return visual(self.task_dict[task][split][doc_id])
