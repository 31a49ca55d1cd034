"""The demo's teacher: rules that write answers from captions and boxes, without a language model."""

from __future__ import annotations

import json
from collections.abc import Iterable

from lora_llava.inference.client.chat_request import ChatAnswer
from lora_llava.inference.client.client import Again
from lora_llava.synthesis.contexts.context import Box, Context
from lora_llava.synthesis.sample import Flavour
from lora_llava.synthesis.teachers.teacher import Answers, TeacherRequest

NAME = "rules (no language model)"
"""Its name in the ledger and the data set card."""
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def answer_by_rules(requests: Iterable[TeacherRequest], again: Again | None = None) -> Answers:
    """Answer requests from their contexts alone.

    Args:
        requests: Requests, whose messages are not read.
        again: Unused, since no request is retried.
    """
    for place, each in enumerate(requests):
        yield place, ChatAnswer(write_by_rules(each.context, each.task.flavour, each.task.number), 0, 0, NAME)


def write_by_rules(context: Context, flavour: Flavour, number: int) -> str:
    """Write one answer in the JSON form that teachers are prompted for.

    Args:
        context: Captions, boxes, or both.
        flavour: Kind of sample.
        number: Index of the sample; other numbers begin with other questions.

    Returns:
        The answer as JSON.
    """
    pairs = _questions(context)
    if flavour == "detail":
        return json.dumps({"description": _describe(context)})
    if flavour == "reasoning":
        question, answer = _reason(context, number)
        return json.dumps({"question": question, "answer": answer})
    turn = number % len(pairs)
    turns = [{"question": question, "answer": answer} for question, answer in pairs[turn:] + pairs[:turn]]
    return json.dumps({"turns": turns[:6]})


def _questions(context: Context) -> list[tuple[str, str]]:
    counts = _counts(context)
    total = len(context.boxes)
    pairs = [("How many things are there?", f"{_word(total).capitalize()}.")] if total else []
    for box in context.boxes:
        if counts[box.label] == 1:
            pairs.append((f"Where is the {box.label}?", f"At the {_where(box)}."))
            pairs.append((f"What is at the {_where(box)}?", f"{_one(box.label).capitalize()}."))
    pairs += [
        (f"Is there more than one {label}?", f"{'Yes' if count > 1 else 'No'}, there {_are(count)} {_word(count)}.")
        for label, count in counts.items()
    ]
    if context.captions:
        pairs.append(("What is shown?", _sentence(context.captions[0])))
    return _unambiguous(pairs)


def _unambiguous(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Keep the questions that have one answer: those about a place that several things share are dropped."""
    answers: dict[str, set[str]] = {}
    for question, answer in pairs:
        answers.setdefault(question, set()).add(answer)
    return [pair for pair in dict.fromkeys(pairs) if len(answers[pair[0]]) == 1]


def _describe(context: Context) -> str:
    sentences = [_sentence(caption) for caption in context.captions[:2]]
    sentences += [f"There is {_one(box.label)} at the {_where(box)}." for box in context.boxes[:12]]
    if context.boxes:
        sentences.append(f"In all, {_word(len(context.boxes))} things can be seen.")
    return " ".join(dict.fromkeys(sentences))


def _reason(context: Context, number: int) -> tuple[str, str]:
    counts = _counts(context)
    boxes = [box for box in context.boxes if counts[box.label] == 1]  # other labels are ambiguous
    if len(boxes) < 2:
        opening = _sentence(context.captions[0]) if context.captions else f"There is {_one(context.boxes[0].label)}."
        kinds = len(counts)
        seen = "one kind of thing" if kinds == 1 else f"{_word(kinds)} kinds of things"
        return "How many kinds of things are there to look at, and why?", f"{opening} So there is {seen} to look at."
    first, second = boxes[number % len(boxes)], boxes[(number + 1) % len(boxes)]
    aspect = ("further to the left", 0) if abs(_middle(first)[0] - _middle(second)[0]) > 0.15 else ("higher up", 1)
    name, axis = aspect
    left = first if _middle(first)[axis] <= _middle(second)[axis] else second
    question = f"Which is {name}, the {first.label} or the {second.label}, and how can you tell?"
    places = f"The {first.label} is at the {_where(first)}, the {second.label} is at the {_where(second)}."
    return question, f"{places} So the {left.label} is {name}."


def _counts(context: Context) -> dict[str, int]:
    counts: dict[str, int] = {}
    for box in context.boxes:
        counts[box.label] = counts.get(box.label, 0) + 1
    return counts


def _middle(box: Box) -> tuple[float, float]:
    left, top, right, bottom = box.corners
    return (left + right) / 2, (top + bottom) / 2


def _where(box: Box) -> str:
    """Name the quarter of the image that holds a box's centre."""
    x, y = _middle(box)
    return f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"


def _one(label: str) -> str:
    return f"{'an' if label[:1].lower() in 'aeiou' else 'a'} {label}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _word(count: int) -> str:
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."
