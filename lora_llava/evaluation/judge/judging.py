"""Have a judge score pairs of answers, and retry until each reply has readable scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.evaluation.judge.review import (
    ATTEMPTS,
    ORDERS,
    JudgeCase,
    JudgeSettings,
    Scores,
    judge_request,
    parse_scores,
)
from lora_llava.inference.client.answer_store import ANSWERED, AnswerStore, request_key
from lora_llava.inference.client.budget import Budget, Charge
from lora_llava.inference.client.client import ChatAnswer, ChatFailure, ChatRequest, ChatServer, ask

_HOPELESS = 8
"""Number of failures, without any answer, after which the run stops."""


@dataclass(frozen=True)
class Verdict:
    """The judgement of one question.

    Attributes:
        case: The question.
        status: `scored`, `unparsed` (no readable scores in any attempt), `failed` (no reply) or `not asked`.
        reference: Score of the reference, averaged over the orders; None unless scored.
        answer: Score of the answer, averaged likewise.
        orders: The known scores of reference and answer, by order.
        reason: Reason of a failure.
    """

    case: JudgeCase
    status: str
    reference: float | None = None
    answer: float | None = None
    orders: Mapping[str, Scores] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class _Pending:
    """A judgement that is not in the ledger."""

    key: str
    request: ChatRequest
    question: str
    attempt: int


class Judge:
    """A judge that reads its answers from a ledger and requests the missing ones.

    Args:
        cases: Pairs of answers to judge.
        model: Name of the judge, a part of each answer's key.
        prompts: From `load_prompts`.
        settings: Settings of the judge.
        ledger: Stores the answers.
    """

    def __init__(
        self,
        cases: Sequence[JudgeCase],
        model: str,
        prompts: Mapping[str, str],
        settings: JudgeSettings,
        ledger: AnswerStore,
    ) -> None:
        self.cases, self.model, self.prompts, self.settings, self.ledger = cases, model, prompts, settings, ledger
        self.failed: dict[str, str] = {}
        self.models: set[str] = set()
        """Names of the model that the server reported in its answers."""

    def pending(self) -> dict[str, _Pending]:
        """Return the next judgements to request, by key, without those that failed."""
        found = [self._look_up(case, order) for case in self.cases for order in self.settings.orders]
        return {item.key: item for item in found if isinstance(item, _Pending) and item.key not in self.failed}

    def run(self, server: ChatServer, budget: Budget) -> None:
        """Send requests until every judgement has scores or has failed, or no attempt or budget is left.

        Args:
            server: The server of the judge, with its model.
            budget: Limits on requests and cost.

        Raises:
            UserError: If the server cannot be used.
        """
        with progress_bar(desc="judging", total=len(self.pending()), unit="text") as bar:
            while (pending := self.pending()) and not budget.exhausted:
                bar.total = bar.n + len(pending)
                self._request(pending, server, budget, bar)

    def _request(self, pending: Mapping[str, _Pending], server: ChatServer, budget: Budget, bar: Any) -> None:
        sent: list[_Pending] = []

        def requests() -> Iterator[ChatRequest]:
            for item in pending.values():
                if not budget.take(item.key, item.request):
                    return
                sent.append(item)
                yield item.request

        def may_try_again(place: int, failure: ChatFailure) -> bool:
            item = sent[place]
            self._charge(item, failure.reason, budget.charge_of(item.request, failure), budget)
            return budget.again(item.key, item.request, failure)

        try:
            with closing(ask(server, requests(), may_try_again)) as answers:
                for index, found in answers:
                    self._record(sent[index], found, server, budget)
                    bar.update()
        except BaseException as error:
            if budget.spent or not isinstance(error, UserError):  # otherwise the server accepted no request
                for item in sent:
                    if budget.holds(item.key):
                        self._charge(item, "not waited for", budget.settle(item.key, item.request, None), budget)
            raise

    def _record(self, item: _Pending, found: ChatAnswer | ChatFailure, server: ChatServer, budget: Budget) -> None:
        charge = budget.settle(item.key, item.request, found)
        if isinstance(found, ChatAnswer):
            self._charge(item, ANSWERED, charge, budget)
            self.ledger.add(item.key, item.question, item.attempt, "", found, charge.usd, "", "")
            return
        self._charge(item, found.reason, charge, budget)
        self.failed[item.key] = found.reason
        if not self.ledger.count() and len(self.failed) >= _HOPELESS:
            raise UserError(f"{server.url} answered none of {len(self.failed)} requests: {found.reason}")

    def _charge(self, item: _Pending, reason: str, charge: Charge, budget: Budget) -> None:
        if budget.capped and (charge.prompt_tokens or charge.completion_tokens):
            self.ledger.add_charge(item.key, reason, charge, capped=True)

    def _look_up(self, case: JudgeCase, order: str) -> Scores | _Pending | None:
        """Return the scores of reference and answer in one order, or the next request; None if every attempt failed."""
        for attempt in range(ATTEMPTS):
            request = judge_request(case, order, self.prompts, self.settings, attempt)
            key = request_key(self.model, request, attempt)
            answer = self.ledger.get(key)
            if answer is None:
                return _Pending(key, request, f"{case.question_id} {order}", attempt)
            self.models.add(answer.model)
            if scores := parse_scores(answer.text):
                return scores if order == ORDERS[0] else (scores[1], scores[0])
        return None

    def verdicts(self) -> list[Verdict]:
        """Return the verdict on every question, in order."""
        return [self._verdict(case) for case in self.cases]

    def _verdict(self, case: JudgeCase) -> Verdict:
        found = {order: self._look_up(case, order) for order in self.settings.orders}
        known = {order: item for order, item in found.items() if isinstance(item, tuple)}
        unanswered = [item for item in found.values() if isinstance(item, _Pending)]
        reasons = [self.failed[item.key] for item in unanswered if item.key in self.failed]
        if None in found.values():
            return Verdict(case, "unparsed", orders=known)
        if reasons:
            return Verdict(case, "failed", orders=known, reason=reasons[0])
        if unanswered:
            return Verdict(case, "not asked", orders=known)
        reference, answer = (sum(scores[place] for scores in known.values()) / len(known) for place in (0, 1))
        return Verdict(case, "scored", reference, answer, known)
