"""`lora-llava verify`: compare a served model's prompts and answers with the model here, and name what differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.evaluation.asked.served_prompts import BOS_FIELD
from lora_llava.inference.client.chat_request import ChatAnswer
from lora_llava.inference.client.client import ChatServer
from lora_llava.inference.served.prompt_pairs import PromptPair
from lora_llava.inference.served.server_facts import ServerFacts
from lora_llava.publishing.verify.asked_questions import AskedQuestion, choose_questions
from lora_llava.publishing.verify.compared import ComparedAnswer, count_table
from lora_llava.publishing.verify.diagnosis import Diagnosis
from lora_llava.publishing.verify.fixes import ServerFault
from lora_llava.publishing.verify.model_here import ModelHere
from lora_llava.publishing.verify.served_answers import ServedAnswer, ask_server, named_server
from lora_llava.publishing.verify.variants import NOISE

QUESTIONS = 12
MAX_NEW_TOKENS = 48
_SHOWN, _BEFORE, _LONGEST = 3, 20, 60
"""Differing answers that are printed, and characters of each before the difference and in all."""


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        server: Its URL.
        kind: Its software.
        served_model: The model's name there.
        questions_from: A phrase on the questions' origin.
        table: Of `count_table`.
        differing: Answers that differ, those that were not given included.
        asked: Number of questions.
        max_differ: Share of the answers that may differ.
        logprob_difference: Mean difference of log-probabilities, in nats per token; None if unknown.
        findings: The faults.
        with_bos_field: Answers that are equal with `add_special_tokens: true`; None where that was not tried.
        answers: The questions with both answers.
    """

    server: str
    kind: str
    served_model: str
    questions_from: str
    table: dict[str, dict[str, tuple[int, int] | None]]
    differing: int
    asked: int
    max_differ: float
    logprob_difference: float | None
    findings: list[ServerFault]
    with_bos_field: int | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no more answers differ than may."""
        return self.differing / self.asked <= self.max_differ

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {"passed": self.passed, **asdict(self)}


def verify(
    model: str,
    server: ChatServer,
    *,
    questions: int = QUESTIONS,
    max_differ: float = 0.0,
    quantization: Literal["auto", "nf4", "none"] = "auto",
) -> VerifyReport:
    """Ask a served model and the model here the same questions, and find out why their answers differ.

    Args:
        model: A run directory, a folder with a complete LLaVA, or a Hub id.
        server: An OpenAI-compatible server.
        questions: Number of questions.
        max_differ: Share of the answers that may differ.
        quantization: How the model here is loaded; see `open_speaker`.

    Returns:
        The report.

    Raises:
        UserError: If the model cannot be loaded, or the server cannot be asked or answers no question.
    """
    server, facts = named_server(server)
    asked, origin = choose_questions(model, questions)
    served = ask_server(server, facts, asked, MAX_NEW_TOKENS)
    here = ModelHere(model, quantization)
    compared = _compare(here, asked, served)
    diagnosis = Diagnosis(here, compared, facts, server.model or "")
    return VerifyReport(
        server.url,
        facts.kind,
        server.model or "",
        origin,
        count_table(compared),
        sum(not one.equal for one in compared),
        len(compared),
        max_differ,
        diagnosis.difference,
        diagnosis.findings,
        _try_bos_field(server, facts, diagnosis.findings, compared),
        [one.as_dict() for one in compared],
    )


def _compare(here: ModelHere, asked: Sequence[AskedQuestion], served: Sequence[ServedAnswer]) -> list[ComparedAnswer]:
    texts: dict[int, str] = {}
    with progress_bar(total=len(asked), desc="answering here", unit="question", leave=False) as bar:
        for place, text in here.answers(asked, MAX_NEW_TOKENS):
            texts[place] = text
            bar.update()
    return [
        ComparedAnswer(question, texts[place], answer, _pair(here, question, answer))
        for place, (question, answer) in enumerate(zip(asked, served, strict=True))
    ]


def _pair(here: ModelHere, question: AskedQuestion, answer: ServedAnswer) -> PromptPair:
    count = answer.found.prompt_tokens if isinstance(answer.found, ChatAnswer) else 0
    return PromptPair(here.prompt(question.messages), len(question.images()), count, answer.ids)


def _try_bos_field(
    server: ChatServer, facts: ServerFacts, findings: Sequence[ServerFault], compared: Sequence[ComparedAnswer]
) -> int | None:
    """Return how many answers are equal once the requests ask for BOS; None if BOS is not missing."""
    if not any(finding.fault == "missing BOS" for finding in findings) or facts.kind == "llama.cpp":
        return None
    adding = replace(server, fields={**server.fields, **BOS_FIELD})
    try:
        found = ask_server(adding, facts, [one.question for one in compared], MAX_NEW_TOKENS)
    except UserError:  # transformers' server refuses fields that it does not know
        return None
    return sum(one.here == answer.text for one, answer in zip(compared, found, strict=True))


def print_verification(model: str, report: VerifyReport, console: Console) -> None:
    """Print a report."""

    def line(text: str) -> None:  # one that may be copied
        console.print(text, soft_wrap=True, markup=False)

    line(f"{report.served_model} at {report.server} ({report.kind}), compared with {model} here")
    console.print(f"{report.asked} questions: {report.questions_from}")
    console.print(_as_table(report))
    if report.logprob_difference is not None:
        console.print(
            f"given the same prompt, log-probabilities differ by {report.logprob_difference:.3f} nats per token "
            f"(rounding alone: up to {NOISE:g})"
        )
    different = [answer for answer in report.answers if answer["server"] != answer["here"]]
    for answer in different[:_SHOWN]:
        console.print(f"differs: {_shown_answer(answer)}", markup=False)
    if len(different) > _SHOWN:
        console.print(f"and {len(different) - _SHOWN} more; --json prints all")
    for finding in report.findings:
        console.print(f"{finding.fault}: {finding.evidence}", markup=False)
        line(f"  fix: {finding.fix}")
    if report.with_bos_field is not None:
        console.print(
            f'  tried: with "add_special_tokens": true, {report.with_bos_field} of {report.asked} answers are equal'
        )
    allowed = f"{100 * report.max_differ:g}%" if report.max_differ else "none"
    verdict = "passed" if report.passed else "failed"
    console.print(f"{verdict}: {report.differing} of {report.asked} answers differ; --max-differ allows {allowed}")


def _as_table(report: VerifyReport) -> Table:
    columns = list(report.table["answers equal"])
    table = Table()
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left")
    for name, counts in report.table.items():
        cells = [counts[column] for column in columns]
        if any(cells):
            table.add_row(name, *(f"{cell[0]} of {cell[1]}" if cell else "-" for cell in cells))
    if any(cell is None for counts in report.table.values() for cell in counts.values()):
        table.caption = "-: not reported by the server, or no reference answer"
    return table


def _shown_answer(answer: dict[str, Any]) -> str:
    """Return both answers from where they begin to differ, or why the server gave none."""
    name, here, there = f"{answer['question']} ({answer['kind']})", answer["here"], answer["server"]
    if there is None:
        return f"{name}: no answer ({answer['problem']})"
    both = enumerate(zip(here, there, strict=False))
    start = max(0, next((place for place, pair in both if pair[0] != pair[1]), min(len(here), len(there))) - _BEFORE)
    parts = ["..." * bool(start) + text[start:][:_LONGEST] for text in (there, here)]
    return f"{name}: {parts[0]!r} on the server, {parts[1]!r} here"
