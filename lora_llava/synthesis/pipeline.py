"""Generation loop: query the teacher until every sample passes the gates, and record every answer in the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.inference.client.answer_store import ANSWERED, AnswerStore, request_key
from lora_llava.inference.client.budget import Budget, Charge
from lora_llava.inference.client.chat_request import ChatAnswer, ChatFailure, ChatRequest
from lora_llava.synthesis.contexts.context import Context
from lora_llava.synthesis.contexts.reading_contexts import Contexts
from lora_llava.synthesis.gates.example_copies import ExampleRuns
from lora_llava.synthesis.gates.gates import Limits, check_sample
from lora_llava.synthesis.gates.retry_texts import RETRY_TEXTS
from lora_llava.synthesis.parse import parse_sample
from lora_llava.synthesis.prompts import RESPONSE_SCHEMAS, Prompt, choose_request, write_messages
from lora_llava.synthesis.sample import Flavour, Rejection, Task, Turns
from lora_llava.synthesis.tasks import Tasks
from lora_llava.synthesis.teachers.teacher import Teacher, TeacherRequest

_HOPELESS = 8
"""Number of failures without a single answer after which a run stops."""


@dataclass(frozen=True)
class PipelineSettings:
    """Settings of the requests to the teacher.

    Attributes:
        model: The teacher's name, which is part of the ledger's keys.
        max_tokens: Maximum length of an answer in tokens.
        temperature: Sampling temperature; None leaves it to the server.
        top_p: Probability mass of nucleus sampling.
        structured: Whether requests include a JSON schema for the answer.
        attempts: Maximum number of attempts for a sample.
        limits: Limits of turns and words.
        seed: Base of the sampling seeds.
    """

    model: str
    max_tokens: int = 1024
    temperature: float | None = 0.7
    top_p: float = 1.0
    structured: bool = True
    attempts: int = 3
    limits: Limits = field(default_factory=Limits)
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """The result of a task.

    Attributes:
        task: The task.
        status: `accepted`, `rejected`, `failed` (no answer), or `not asked` (not requested yet).
        turns: Turns of an accepted sample.
        rejections: Rejection of every attempt that did not pass.
        reason: Reason of a failure.
        model: Model of the last answer, as the server names it.
    """

    task: Task
    status: str
    turns: Turns = ()
    rejections: tuple[Rejection, ...] = ()
    reason: str = ""
    model: str = ""


def write_request(
    task: Task,
    context: Context,
    prompt: Prompt,
    settings: PipelineSettings,
    attempt: int = 0,
    rejections: Sequence[Rejection] = (),
) -> ChatRequest:
    """Write the request for one attempt at a sample.

    Args:
        task: Sample to generate.
        context: Context of its image.
        prompt: Prompt of its flavour.
        settings: Settings of the request.
        attempt: Index of the attempt, from 0.
        rejections: Rejections of the earlier attempts; the request states the reason of the last one.
    """
    messages = write_messages(prompt, context)
    if rejections:
        why = RETRY_TEXTS[rejections[-1].reason]
        messages[-1]["content"] += f"\n\nAn earlier answer was not taken: {why}. Write another in the same form."
    is_sampled = settings.temperature is None or settings.temperature > 0
    return ChatRequest(
        messages,
        settings.max_tokens,
        settings.temperature,
        settings.top_p,
        # One seed per sample and attempt, so that two samples of an image differ.
        seed=settings.seed + task.number + 1000 * attempt if is_sampled else None,
        response_format=RESPONSE_SCHEMAS[task.flavour] if settings.structured else None,
    )


class SampleGenerator:
    """Generator of samples; it queries the teacher only for answers that the ledger does not contain.

    Args:
        contexts: Contexts of the images.
        tasks: Samples to generate.
        prompts: Prompts by flavour, from `load_prompts`.
        settings: Settings of the requests.
        ledger: Store of the answers.
    """

    def __init__(
        self,
        contexts: Contexts,
        tasks: Tasks,
        prompts: Mapping[Flavour, Prompt],
        settings: PipelineSettings,
        ledger: AnswerStore,
    ) -> None:
        self.contexts, self.tasks, self.prompts, self.settings = contexts, tasks, prompts, settings
        self.ledger = ledger
        self.examples = {
            flavour: ExampleRuns((each.context, each.answer) for each in prompt.examples)
            for flavour, prompt in prompts.items()
        }
        self.failed: dict[str, str] = {}
        """Reasons of failures in this run, by task id."""
        self.answered = 0

    def run(self, teacher: Teacher, budget: Budget) -> None:
        """Query the teacher until every sample is accepted, given up or failed, or the budget is spent.

        Args:
            teacher: Writer of the answers.
            budget: Caps on requests and cost.

        Raises:
            UserError: If the teacher cannot be used, or the ledger cannot be written.
        """
        left = list(range(len(self.tasks)))
        with progress_bar(desc="generating", total=len(left), unit="sample", smoothing=0.05) as bar:
            while left and not budget.exhausted:
                remaining = self._run_round(left, teacher, budget, bar)
                left = [number for number in remaining if self.tasks[number].task_id not in self.failed]

    def _run_round(self, numbers: list[int], teacher: Teacher, budget: Budget, bar: Any) -> list[int]:
        """Send one attempt for each task.

        Returns:
            Tasks that may get another attempt: their answer was rejected, or the budget was reserved for requests that
            were still running.
        """
        sent: list[tuple[int, TeacherRequest]] = []
        again: list[int] = []
        rest: list[int] = []

        def requests() -> Iterator[TeacherRequest]:
            for place, number in enumerate(numbers):
                item = self.look_up(self.tasks[number])
                if not isinstance(item, TeacherRequest):
                    bar.update()
                    continue
                if not budget.take(item.key, item.request):
                    rest.extend(numbers[place:])
                    return
                sent.append((number, item))
                yield item

        def may_try_again(place: int, failure: ChatFailure) -> bool:
            item = sent[place][1]
            self._charge(item, failure.reason, budget.charge_of(item.request, failure), budget)
            return budget.again(item.key, item.request, failure)

        try:
            with closing(teacher(requests(), may_try_again)) as answers:
                for place, found in answers:
                    number, item = sent[place]
                    charge = budget.settle(item.key, item.request, found)
                    if not isinstance(found, ChatAnswer):
                        self._charge(item, found.reason, charge, budget)
                        self._fail(item, found.reason)
                        bar.update()
                        continue
                    is_accepted = self._record(item, found, charge, budget) is None
                    if is_accepted or item.attempt + 1 == self.settings.attempts:
                        bar.update()
                    else:
                        again.append(number)
        except BaseException as error:
            # Charge the requests that were running. A UserError before any spending means that none was processed.
            if budget.spent or not isinstance(error, UserError):
                for _, item in sent:
                    if budget.holds(item.key):
                        self._charge(item, "not waited for", budget.settle(item.key, item.request, None), budget)
            raise
        return again + rest

    def _charge(self, item: TeacherRequest, reason: str, charge: Charge, budget: Budget) -> None:
        """Record a charge, unless it is empty."""
        if charge.prompt_tokens or charge.completion_tokens:
            self.ledger.add_charge(item.key, reason, charge, budget.capped)

    def _record(self, item: TeacherRequest, answer: ChatAnswer, charge: Charge, budget: Budget) -> Rejection | None:
        """Add an answer to the ledger; returns its rejection, or None if it is accepted."""
        self.answered += 1
        # JSON may contain unpaired surrogates, which UTF-8 cannot encode.
        answer = replace(answer, text=answer.text.encode("utf-8", "replace").decode("utf-8"))
        checked = self.check(item.task, answer.text)
        rejection = checked if isinstance(checked, Rejection) else None
        verdict, detail = (rejection.reason, rejection.detail) if rejection else ("accepted", "")
        prompt_hash = self.prompts[item.task.flavour].hash
        if budget.capped:
            self._charge(item, ANSWERED, charge, budget)
        self.ledger.add(item.key, item.task.task_id, item.attempt, prompt_hash, answer, charge.usd, verdict, detail)
        return rejection

    def _fail(self, item: TeacherRequest, reason: str) -> None:
        """Record a failed request; raise if the teacher has answered none so far."""
        self.failed[item.task.task_id] = reason
        self.ledger.add_failure(item.key, item.task.task_id, item.attempt, reason)
        if not self.answered and len(self.failed) >= _HOPELESS:
            raise UserError(f"the teacher answered none of {len(self.failed)} requests: {reason}")

    def check(self, task: Task, text: str) -> Turns | Rejection:
        """Parse an answer and check it with the gates."""
        request = choose_request(self.prompts[task.flavour], task.task_id)
        turns = parse_sample(text, task.flavour, request, self.settings.limits.min_turns)
        if isinstance(turns, Rejection):
            return turns
        context, limits = self.contexts[task.place], self.settings.limits
        return check_sample(context, turns, task.flavour, limits, self.examples[task.flavour]) or turns

    def look_up(self, task: Task, rejections: list[Rejection] | None = None) -> Result | TeacherRequest:
        """Return the result of a task if the ledger contains its answers, else the next request to send.

        Args:
            task: The task.
            rejections: Receives the rejections of the attempts so far.
        """
        rejections = [] if rejections is None else rejections
        model = ""
        for attempt in range(self.settings.attempts):
            request = self._request(task, attempt, rejections)
            key = request_key(self.settings.model, request, task.task_id, attempt)
            entry = self.ledger.get(key)
            if entry is None:
                return TeacherRequest(task, self.contexts[task.place], replace(request, key=key), key, attempt)
            model = entry.model
            checked = self.check(task, entry.text)
            if not isinstance(checked, Rejection):
                return Result(task, "accepted", checked, tuple(rejections), model=model)
            rejections.append(checked)
        return Result(task, "rejected", rejections=tuple(rejections), model=model)

    def answer_of(self, task: Task, attempt: int) -> str | None:
        """Return the teacher's answer at one attempt; None if it is not in the ledger."""
        rejections: list[Rejection] = []
        for number in range(attempt + 1):
            request = self._request(task, number, rejections)
            entry = self.ledger.get(request_key(self.settings.model, request, task.task_id, number))
            if entry is None or number == attempt:
                return entry.text if entry else None
            checked = self.check(task, entry.text)
            rejections += [checked] if isinstance(checked, Rejection) else []
        return None

    def _request(self, task: Task, attempt: int, rejections: list[Rejection]) -> ChatRequest:
        prompt = self.prompts[task.flavour]
        return write_request(task, self.contexts[task.place], prompt, self.settings, attempt, rejections)

    def results(self) -> Iterator[Result]:
        """Yield the result of every task in order."""
        for task in self.tasks:
            rejections: list[Rejection] = []
            found = self.look_up(task, rejections)
            if isinstance(found, Result):
                yield found
            elif task.task_id in self.failed:
                yield Result(task, "failed", rejections=tuple(rejections), reason=self.failed[task.task_id])
            else:
                yield Result(task, "not asked", rejections=tuple(rejections))
