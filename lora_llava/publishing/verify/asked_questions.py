"""The questions that a served model and the model here are asked: held-out rows, or built-in ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation
from lora_llava.data.images.image_sources import BadImageError, SplitImages
from lora_llava.data.typed import without_marks
from lora_llava.evaluation.answer_metrics import EXACT
from lora_llava.evaluation.answers import score_answer
from lora_llava.evaluation.evaluate import EvaluationOptions, held_out_rows, open_evaluation
from lora_llava.evaluation.scienceqa import make_prediction
from lora_llava.inference.client.chat_request import image_part
from lora_llava.publishing.proof_prompts import ASKED_OF_IMAGES, ASKED_WITHOUT, draw_image
from lora_llava.recipe import EvaluationSection
from lora_llava.recipe.io import RECIPE_FILE

QuestionKind = Literal["with image", "without image", "several turns"]
KINDS: tuple[QuestionKind, ...] = ("with image", "without image", "several turns")
_READ = 20
"""Rows drawn for each question, so that all kinds are found."""


@dataclass(frozen=True)
class AskedQuestion:
    """One question.

    Attributes:
        kind: What it tests.
        name: Names it in messages.
        messages: `{"role", "content"}`, the content a list of text and image parts; images are PIL images.
        is_right: Checks an answer against the reference; None if there is none.
    """

    kind: QuestionKind
    name: str
    messages: list[dict[str, Any]]
    is_right: Callable[[str], bool] | None = None

    def images(self) -> list[Image.Image]:
        """Return its images in order."""
        return images_in(self.messages)

    def to_send(self) -> list[dict[str, Any]]:
        """Return the messages in OpenAI's form."""
        return [{"role": message["role"], "content": _content(message["content"])} for message in self.messages]


def images_in(messages: Sequence[dict[str, Any]]) -> list[Image.Image]:
    """Return the images of messages in order."""
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


class AskedImages:
    """The images of questions by name, as the images of a split.

    Args:
        questions: The questions.
    """

    def __init__(self, questions: Sequence[AskedQuestion]) -> None:
        self._images = [question.images() for question in questions]

    def names(self, place: int) -> list[str]:
        """Return the names of the images of a question, by its index."""
        return [f"{place}/{number}" for number, _ in enumerate(self._images[place])]

    def open(self, name: str) -> Image.Image:
        place, number = name.split("/")
        return self._images[int(place)][int(number)]

    def read(self, name: str) -> bytes:
        raise NotImplementedError  # a question has the opened image, not its file

    def label(self, name: str) -> str:
        return name


def _content(parts: Sequence[dict[str, Any]]) -> Any:
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return [image_part(part["image"]) if part["type"] == "image" else part for part in parts]


def choose_questions(model: str, count: int) -> tuple[list[AskedQuestion], str]:
    """Choose questions of every kind, a third of each where there are as many.

    Args:
        model: A run directory or a model's folder; its recipe names the held-out rows.
        count: Number of questions.

    Returns:
        The questions, and a phrase on their origin.
    """
    wanted = {kind: count // 3 + (count % 3 > place) for place, kind in enumerate(KINDS)}
    found: dict[QuestionKind, list[AskedQuestion]] = {kind: [] for kind in KINDS}
    rows, images, origin, parser = _held_out(model, count)
    for question in _of_rows(rows, images, parser):
        if len(found[question.kind]) < wanted[question.kind]:
            found[question.kind].append(question)
    used = sum(map(len, found.values()))
    for kind in KINDS:
        found[kind] += [_built_in(kind, place) for place in range(wanted[kind] - len(found[kind]))]
    where = f"{used} from {origin}" if used else f"built-in, since {origin}"
    return [question for kind in KINDS for question in found[kind]], where + (
        f", {count - used} built-in" if 0 < used < count else ""
    )


def _held_out(model: str, count: int) -> tuple[Sequence[Conversation], SplitImages | None, str, str]:
    """Return held-out rows, their images, a phrase on their origin and the parser of ScienceQA's letters."""
    if not (Path(model) / RECIPE_FILE).is_file():
        return [], None, "the model has no recipe", ""
    options = EvaluationOptions(bad_images="wrong")
    try:
        opened = open_evaluation(model, options)
        rows = held_out_rows(opened, options, _READ * count)
    except (UserError, OSError):
        return [], None, "the run's data cannot be read here", ""
    parser = (opened.recipe.evaluation or EvaluationSection()).parser
    return rows, opened.split.images, f"the run's {opened.name} rows", parser


def _of_rows(rows: Sequence[Conversation], images: SplitImages | None, parser: str) -> Iterator[AskedQuestion]:
    """Yield rows as questions; every third becomes one of several turns, after another row's question and answer."""
    before: Conversation | None = None
    for place, row in enumerate(rows):
        if images is None or any(IMAGE_PLACEHOLDER in turn.shown for turn in row.turns if not row.images):
            continue
        try:
            messages = _messages(row, images)
            history = _messages(before, images, whole=True) if before is not None and place % 3 == 2 else []
        except BadImageError:
            continue
        asked = sum(message["role"] == "user" for message in messages)
        is_right: Callable[[str], bool] | None = _checker(row, parser)
        if asked == 1 and history and messages[0]["role"] != "system" and not (row.images and before and before.images):
            messages, asked, is_right = history + messages, 2, None  # not a conversation of the data
        kind: QuestionKind = "several turns" if asked > 1 else "with image" if row.images else "without image"
        yield AskedQuestion(kind, row.named or row.row_id, messages, is_right)
        before = row if asked == 1 and messages[0]["role"] != "system" else before


def _messages(row: Conversation, images: SplitImages, *, whole: bool = False) -> list[dict[str, Any]]:
    """Return a row's turns up to its last answer, or with it, as messages with opened images."""
    names = iter(row.images)
    messages = []
    for turn in row.turns if whole else row.turns[:-1]:
        pieces = turn.text.split(IMAGE_PLACEHOLDER)
        parts: list[dict[str, Any]] = []
        for place, piece in enumerate(pieces):
            if place:
                parts.append({"type": "image", "image": images.open(next(names))})
            text = without_marks(piece)
            text = text.strip("\n") if len(pieces) > 1 else text  # the template adds the line break at an image
            if text or len(pieces) == 1:
                parts.append({"type": "text", "text": text})
        messages.append({"role": turn.role, "content": parts})
    return messages


def _checker(row: Conversation, parser: str) -> Callable[[str], bool]:
    def is_right(text: str) -> bool:
        if "num_choices" in row.extra:
            found = make_prediction(row.row_id, text, row.extra, None, parser)
            return found["prediction"] == found["answer"]
        reference = row.turns[-1].shown
        return bool(score_answer(row.row_id, "", "", reference, text)[EXACT])  # type: ignore[literal-required]

    return is_right


def _built_in(kind: QuestionKind, place: int) -> AskedQuestion:
    shown = [
        {"type": "image", "image": draw_image(place)},
        {"type": "text", "text": ASKED_OF_IMAGES[place % len(ASKED_OF_IMAGES)]},
    ]
    written = [{"type": "text", "text": ASKED_WITHOUT[place % len(ASKED_WITHOUT)]}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": written if kind == "without image" else shown}]
    if kind == "several turns":
        answer = {"role": "assistant", "content": [{"type": "text", "text": "Three shapes."}]}
        messages += [answer, {"role": "user", "content": written}]
    return AskedQuestion(kind, f"built-in {kind} {place + 1}", messages)
