"""The samples of a set: asked for until each passes the gates, every answer in the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from lora_llava.core.errors import UserError
from lora_llava.inference.answer_store import ANSWERED, AnswerStore, request_key
from lora_llava.inference.budget import Budget, Charge
from lora_llava.inference.chat_request import ChatAnswer, ChatFailure, ChatRequest
from lora_llava.synthesis.contexts.context import Context
from lora_llava.synthesis.contexts.reading_contexts import Contexts
from lora_llava.synthesis.gates.gates import REASONS, Limits, check_sample
from lora_llava.synthesis.parse import parse_sample
from lora_llava.synthesis.prompts import RESPONSE_SCHEMAS, Prompt, choose_request, write_messages
from lora_llava.synthesis.sample import Flavour, Rejection, Task, Turns
from lora_llava.synthesis.tasks import Tasks
from lora_llava.synthesis.teachers.teacher import Asked, Teacher

_HOPELESS = 8
"""Failures in a row at the start after which the rest is not tried."""


@dataclass(frozen=True)
class Settings:
    """How samples are asked for.

    Attributes:
        model: The teacher's name, which keys the answers.
        max_tokens: Longest answer.
        temperature: Of the teacher; None leaves it to the server.
        top_p: Share of the probability that tokens are drawn from.
        structured: Whether JSON is asked for by schema.
        attempts: Times that a sample is asked for.
        limits: Of the gates, by flavour.
        seed: Of what is drawn.
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
    """What came of a task.

    Attributes:
        task: Which.
        status: `accepted`, `rejected`, `failed` (no answer), or `not asked`.
        turns: Of an accepted sample.
        rejections: Of every attempt that was not taken.
        reason: Of a failure.
        model: Who wrote the last answer, as the server names it.
    """

    task: Task
    status: str
    turns: Turns = ()
    rejections: tuple[Rejection, ...] = ()
    reason: str = ""
    model: str = ""


def write_request(
    task: Task, context: Context, prompt: Prompt, settings: Settings, attempt: int = 0,
    rejections: Sequence[Rejection] = (),
) -> ChatRequest:  # fmt: skip
    """What the teacher is sent.

    Args:
        task: What is to be made.
        context: Of its image.
        prompt: Of its flavour.
        settings: How it is asked for.
        attempt: Which try this is, from 0.
        rejections: Of the earlier ones; the last one's reason is told.
    """
    messages = write_messages(prompt, context)
    if rejections:
        told = REASONS[rejections[-1].reason]
        messages[-1]["content"] += f"\n\nAn earlier answer was not taken: {told}. Write another in the same form."
    drawn = settings.temperature is None or settings.temperature > 0
    return ChatRequest(
        messages, settings.max_tokens, settings.temperature, settings.top_p,
        seed=settings.seed + task.number + 1000 * attempt if drawn else None,  # two samples of an image should differ
        response_format=RESPONSE_SCHEMAS[task.flavour] if settings.structured else None,
    )  # fmt: skip


class Maker:
    """Makes samples by a ledger of answers; what the ledger lacks is asked for.

    Args:
        contexts: What is known of the images.
        tasks: What is to be made.
        prompts: From `load_prompts`.
        settings: How it is asked for.
        ledger: Keeps the answers.
    """

    def __init__(
        self,
        contexts: Contexts,
        tasks: Tasks,
        prompts: Mapping[Flavour, Prompt],
        settings: Settings,
        ledger: AnswerStore,
    ) -> None:
        self.contexts, self.tasks, self.prompts, self.settings = contexts, tasks, prompts, settings
        self.ledger = ledger
        self.failed: dict[str, str] = {}
        """Reasons by task id."""
        self.answered = 0

    def run(self, teacher: Teacher, budget: Budget) -> None:
        """Ask until every sample is taken, given up or failed, or the budget is spent.

        Args:
            teacher: Who writes.
            budget: What may be asked.

        Raises:
            UserError: Where the teacher cannot be used, or the ledger cannot be written.
        """
        left = list(range(len(self.tasks)))
        with tqdm(desc="generating", total=len(left), unit="sample", dynamic_ncols=True, smoothing=0.05) as bar:
            while left and not budget.exhausted:
                asked = self._ask(left, teacher, budget, bar)
                left = [number for number in asked if self.tasks[number].task_id not in self.failed]

    def _ask(self, numbers: list[int], teacher: Teacher, budget: Budget, bar: Any) -> list[int]:
        """One round; gives the tasks whose answers were not taken and that may be asked for again, and those for which
        no money was left as long as others were on their way."""
        sent: list[tuple[int, Asked]] = []
        again: list[int] = []
        rest: list[int] = []

        def requests() -> Iterator[Asked]:
            for place, number in enumerate(numbers):
                item = self.look_up(self.tasks[number])
                if not isinstance(item, Asked):
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
                    taken = self._keep(item, found, charge, budget) is None
                    if taken or item.attempt + 1 == self.settings.attempts:
                        bar.update()
                    else:
                        again.append(number)
        except BaseException as error:
            if budget.spent or not isinstance(error, UserError):  # else the server let nothing in
                for _, item in sent:
                    if budget.holds(item.key):
                        self._charge(item, "not waited for", budget.settle(item.key, item.request, None), budget)
            raise
        return again + rest

    def _charge(self, item: Asked, reason: str, charge: Charge, budget: Budget) -> None:
        if charge.prompt_tokens or charge.completion_tokens:
            self.ledger.add_charge(item.key, reason, charge, budget.capped)

    def _keep(self, item: Asked, answer: ChatAnswer, charge: Charge, budget: Budget) -> Rejection | None:
        self.answered += 1
        # Half a surrogate pair, which JSON may hold, is in no file's UTF-8.
        answer = replace(answer, text=answer.text.encode("utf-8", "replace").decode("utf-8"))
        judged = self.judge(item.task, answer.text)
        rejection = judged if isinstance(judged, Rejection) else None
        verdict, detail = (rejection.reason, rejection.detail) if rejection else ("accepted", "")
        prompt_hash = self.prompts[item.task.flavour].hash
        if budget.capped:
            self._charge(item, ANSWERED, charge, budget)
        self.ledger.add(item.key, item.task.task_id, item.attempt, prompt_hash, answer, charge.usd, verdict, detail)
        return rejection

    def _fail(self, item: Asked, reason: str) -> None:
        self.failed[item.task.task_id] = reason
        self.ledger.add_failure(item.key, item.task.task_id, item.attempt, reason)
        if not self.answered and len(self.failed) >= _HOPELESS:
            raise UserError(f"the teacher answered none of {len(self.failed)} requests: {reason}")

    def judge(self, task: Task, text: str) -> Turns | Rejection:
        """Read an answer and hold it against the gates."""
        turns = parse_sample(text, task.flavour, choose_request(self.prompts[task.flavour], task.task_id))
        if isinstance(turns, Rejection):
            return turns
        return check_sample(self.contexts[task.place], turns, task.flavour, self.settings.limits) or turns

    def look_up(self, task: Task, rejections: list[Rejection] | None = None) -> Result | Asked:
        """What came of a task by the ledger, or what to ask for next; what was not taken goes to `rejections`."""
        rejections = [] if rejections is None else rejections
        model = ""
        for attempt in range(self.settings.attempts):
            request = self._request(task, attempt, rejections)
            key = request_key(self.settings.model, request, task.task_id, attempt)
            entry = self.ledger.get(key)
            if entry is None:
                return Asked(task, self.contexts[task.place], replace(request, key=key), key, attempt)
            model = entry.model
            judged = self.judge(task, entry.text)
            if not isinstance(judged, Rejection):
                return Result(task, "accepted", judged, tuple(rejections), model=model)
            rejections.append(judged)
        return Result(task, "rejected", rejections=tuple(rejections), model=model)

    def answer_of(self, task: Task, attempt: int) -> str | None:
        """What the teacher wrote at one attempt; None where it was not asked."""
        rejections: list[Rejection] = []
        for number in range(attempt + 1):
            request = self._request(task, number, rejections)
            entry = self.ledger.get(request_key(self.settings.model, request, task.task_id, number))
            if entry is None or number == attempt:
                return entry.text if entry else None
            judged = self.judge(task, entry.text)
            rejections += [judged] if isinstance(judged, Rejection) else []
        return None

    def _request(self, task: Task, attempt: int, rejections: list[Rejection]) -> ChatRequest:
        prompt = self.prompts[task.flavour]
        return write_request(task, self.contexts[task.place], prompt, self.settings, attempt, rejections)

    def results(self) -> Iterator[Result]:
        """What has come of every task, in their order."""
        for task in self.tasks:
            rejections: list[Rejection] = []
            found = self.look_up(task, rejections)
            if isinstance(found, Result):
                yield found
            elif task.task_id in self.failed:
                yield Result(task, "failed", rejections=tuple(rejections), reason=self.failed[task.task_id])
            else:
                yield Result(task, "not asked", rejections=tuple(rejections))
