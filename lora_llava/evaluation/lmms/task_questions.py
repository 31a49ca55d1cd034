"""Ask the questions of lmms-eval's tasks: of a model here, in batches, or of a server."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation, Turn
from lora_llava.data.images.to_rgb import Background, to_rgb
from lora_llava.data.tokens import leading_ids
from lora_llava.data.typed import as_typed
from lora_llava.evaluation.answerers import Answerer, by_server, server_messages
from lora_llava.evaluation.asked.served_prompts import SentPrompt, match_bos
from lora_llava.evaluation.asked.spoken_answers import by_speaker, given_losses, written_messages
from lora_llava.evaluation.row_evaluation import evaluate_rows, report
from lora_llava.inference.answer import Answer
from lora_llava.inference.client.chat_request import ChatRequest
from lora_llava.inference.client.client import ChatServer
from lora_llava.inference.prompt import prompt_ids
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import Speaker
from lora_llava.model.families.tower_families import tokens_of_image

MAX_NEW_TOKENS = 1024
"""Most tokens of an answer where a task names no number, as lmms-eval's own models."""
_USED = ("max_new_tokens", "temperature", "top_p", "do_sample", "until", "image_aspect_ratio")
"""Settings that have an effect here. The last is LLaVA's own: the model's image processor decides."""


@dataclass(frozen=True)
class TaskQuestion:
    """One question of a task.

    Attributes:
        name: Its number in the task.
        text: The text, with the task's own instruction.
        images: Opens its images; they are opened again when they are needed.
        answer: A given answer whose loss is computed; empty where one is generated.
    """

    name: str
    text: str
    images: Callable[[], Sequence[Any] | None]
    answer: str = ""


@dataclass(frozen=True)
class TaskSettings:
    """How a task wants its answers generated.

    Attributes:
        sampling: How tokens are sampled.
        until: Texts that end an answer.
        unused: Settings of the task that have no effect here, as `name=value`.
    """

    sampling: Sampling
    until: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def cut(self, answer: str) -> str:
        """Return an answer up to the first text that ends it."""
        return answer[: min((answer.find(text) for text in self.until if text in answer), default=len(answer))]


def read_settings(values: Mapping[str, Any]) -> TaskSettings:
    """Read the `generation_kwargs` of a task."""
    until = values.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(text for text in until if text)
    temperature = float(values.get("temperature") or 0) if values.get("do_sample", True) else 0.0
    sampling = Sampling(
        temperature, float(values.get("top_p") or 1), int(values.get("max_new_tokens") or MAX_NEW_TOKENS), 0
    )
    single = {name: value for name, value in values.items() if not (name == "num_beams" and value in (1, None))}
    return TaskSettings(sampling, until, tuple(f"{name}={single[name]}" for name in single if name not in _USED))


@dataclass
class TaskImages:
    """The images of a task's questions, by a hash of their pixels: questions about one image share its name.

    Attributes:
        background: Colour behind transparent parts.
    """

    background: Background = "white"
    _openers: dict[str, tuple[TaskQuestion, int]] = field(default_factory=dict)

    def add(self, question: TaskQuestion, task: str) -> tuple[str, ...]:
        """Return the names of a question's images.

        Raises:
            UserError: If the question comes with something else, such as a video.
        """
        names = []
        for place, image in enumerate(question.images() or ()):
            if not isinstance(image, Image.Image):
                what = type(image).__name__
                raise UserError(
                    f"{task}: question {question.name} comes with a {what}, not an image; choose tasks of images and "
                    "text"
                )
            names.append(hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest())
            self._openers.setdefault(names[-1], (question, place))
        return tuple(names)

    def open(self, name: str) -> Image.Image:
        question, place = self._openers[name]
        return to_rgb((question.images() or ())[place], self.background).image

    def read(self, name: str) -> bytes:
        return self.open(name).tobytes()

    def label(self, name: str) -> str:
        return f"image {self._openers[name][1] + 1} of question {self._openers[name][0].name}"


@dataclass
class TaskAsker:
    """Asks the questions of tasks.

    Attributes:
        speaker: The model here; None for a server.
        server: The server; None for the model here.
        folder: Folder for the answers.
        about: All that answers depend on besides the questions and the task's settings.
        suffix: End of the names of the files.
        batch_size: Most questions in one batch.
        processor: The processor of the model that a server serves, to check its prompts; None if it is not here.
        config: Its configuration, which counts the tokens of images, for that.
        background: Colour behind transparent parts of images.
    """

    speaker: Speaker | None
    server: ChatServer | None
    folder: Path
    about: Mapping[str, Any]
    suffix: str = ""
    batch_size: int = 8
    processor: Any = None
    config: LlavaConfig | None = None
    background: Background = "white"

    def generate(self, task: str, questions: Sequence[TaskQuestion], settings: TaskSettings) -> list[str]:
        """Return an answer to each question; those of a stopped run are kept, and asked for no more.

        Args:
            task: Name of the task.
            questions: Its questions.
            settings: How it wants answers generated.

        Raises:
            UserError: If a question cannot be asked.
            UnansweredError: If a server left questions unanswered.
        """
        if settings.unused:
            report(f"{task}: {', '.join(settings.unused)} is not used here")
        images = TaskImages(self.background)
        rows = [_conversation(task, question, images) for question in questions]
        answerer = self._answerer(rows, images, settings.sampling)

        def line(index: int, row: Conversation, answer: Answer) -> dict[str, Any]:
            return {"question_id": row.row_id, "text": settings.cut(answer.text)}

        key = {"task": task, "sampling": asdict(settings.sampling), "until": settings.until, **self.about}
        file = self.folder / f"lmms_{file_name(task)}{self.suffix}.jsonl"
        scored = evaluate_rows(rows, answerer, line, predictions=file, description=task, key=key)
        return [each["text"] for each in scored]

    def _answerer(self, rows: Sequence[Conversation], images: TaskImages, sampling: Sampling) -> Answerer:
        if self.server is None:
            assert self.speaker is not None
            return by_speaker(self.speaker, images, self.batch_size, sampling)
        server = self.server if self.processor is None else self._with_bos(self.server, rows, images)
        return by_server(server, images, sampling, None)

    def _with_bos(self, server: ChatServer, rows: Sequence[Conversation], images: TaskImages) -> ChatServer:
        """Add the field that makes the server put BOS in front, if it is needed and taken."""
        asked = [next((row for row in rows if bool(row.images) == shown), None) for shown in (False, True)]
        prompts = [
            SentPrompt(
                ChatRequest(server_messages(row, images), 1),
                prompt_ids(self.processor, written_messages(row)[:-1], self._tokens(row, images)),
                len(row.images),
            )
            for row in asked
            if row is not None
        ]
        server, lines = match_bos(server, prompts, leading_ids(self.processor.tokenizer), str(self.folder))
        for text in lines:
            report(text)
        return server

    def _tokens(self, row: Conversation, images: TaskImages) -> list[int]:
        assert self.config is not None  # the processor's model is here
        opened = [images.open(str(name)) for name in row.images]
        return [tokens_of_image(self.config, (image.height, image.width)) for image in opened]

    def losses(self, task: str, questions: Sequence[TaskQuestion]) -> list[tuple[float, bool]]:
        """Return the mean loss of each given answer's tokens in nats, and whether the answer is the greedy one.

        Raises:
            UserError: For a server, whose losses of given answers are not known.
        """
        if self.speaker is None:
            raise UserError(f"{task} compares given answers by their loss, which needs the model; leave --server out")
        images = TaskImages(self.background)
        rows = [_conversation(task, question, images) for question in questions]
        found: dict[int, tuple[float, bool]] = {}
        with progress_bar(total=len(rows), desc=task, unit="answer") as bar:
            for index, loss, greedy in given_losses(self.speaker, rows, images, self.batch_size):
                found[index] = (loss, greedy)
                bar.update()
        return [found[index] for index in range(len(rows))]


def _conversation(task: str, question: TaskQuestion, images: TaskImages) -> Conversation:
    """Return a question as a conversation; where the text does not place its images, they come first."""
    names = images.add(question, task)
    text = question.text
    if not names or text.count(IMAGE_PLACEHOLDER) != len(names):
        text = f"{IMAGE_PLACEHOLDER}\n" * len(names) + as_typed(text, [IMAGE_PLACEHOLDER])
    turns = (Turn("user", text), Turn("assistant", question.answer.strip() or "?"))
    return Conversation(question.name, turns, names, named=f"{task}: question {question.name}")


def file_name(task: str) -> str:
    """Return a task's name with only letters that every file system takes."""
    return re.sub(r"[^\w.-]+", "_", task)
