"""Who answers: a model here, by writing or by weighing choices, or a server."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation, Message
from lora_llava.data.encode import IGNORE_INDEX, encode_conversation, encode_prompt
from lora_llava.data.images.reading import BadImageError, ImageSource, PixelLoader
from lora_llava.data.templates import Template
from lora_llava.data.typed import without_marks
from lora_llava.distributed.ranks import gather, this_rank
from lora_llava.inference.answer import Answer
from lora_llava.inference.chat_request import ChatFailure, ChatRequest, image_part
from lora_llava.inference.client import ChatServer, ask
from lora_llava.inference.generate import EncodedImages, Question, generate_answers
from lora_llava.inference.likelihood import Choices, answer_losses, build_tree, weigh_choices
from lora_llava.inference.sampling import Sampling

Answerer = Callable[[Sequence[Conversation], Collection[int]], Iterator[tuple[int, Answer]]]
"""Answers the last question of each row, the turns before it as history, but for the rows of these indices; gives
index and answer as they come."""


@dataclass(frozen=True)
class Asked:
    """A model here, and what its questions are written with.

    Attributes:
        model: A LLaVA, with or without adapter.
        tokenizer: The processor's.
        template: The one that was trained.
        num_image_tokens: Of one image.
        load_pixels: Gives the rows' images.
        batch_size: Questions at once.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: Template
    num_image_tokens: int
    load_pixels: PixelLoader
    batch_size: int

    def prompt(self, row: Conversation) -> list[int]:
        """Ids of a row up to where its last answer starts."""
        return encode_prompt(
            messages_of(row)[:-1], tokenizer=self.tokenizer, template=self.template,
            num_image_tokens=self.num_image_tokens,
        )  # fmt: skip

    def with_answer(self, row: Conversation, answer: str) -> tuple[list[int], list[int]]:
        """Ids and labels of a row with this answer at its end, the answer alone labelled."""
        messages = [*messages_of(row)[:-1], {"role": "assistant", "content": answer}]
        encoded = encode_conversation(
            messages, tokenizer=self.tokenizer, template=self.template, num_image_tokens=self.num_image_tokens
        )
        before = len(self.prompt(row))
        return encoded["input_ids"], [IGNORE_INDEX] * before + encoded["labels"][before:]


def messages_of(row: Conversation) -> list[Message]:
    """A row's turns as messages."""
    return [{"role": turn.role, "content": turn.text} for turn in row.turns]


def by_writing(asked: Asked, sampling: Sampling) -> Answerer:
    """Answers that the model writes.

    Args:
        asked: The model.
        sampling: How tokens are drawn.
    """

    def answer(rows: Sequence[Conversation], answered: Collection[int]) -> Iterator[tuple[int, Answer]]:
        questions = [Question(asked.prompt(row), row.images) for row in rows]
        return generate_answers(
            asked.model, questions, tokenizer=asked.tokenizer, load_pixels=asked.load_pixels,
            batch_size=asked.batch_size, sampling=sampling, stop_string=asked.template.stop_string, answered=answered,
        )  # fmt: skip

    return answer


Choose = Callable[[Conversation, str], Sequence[str]]
"""Gives the answers that a row may have, behind what was written before them."""


def by_likelihood(asked: Asked, choices: Choose) -> Answerer:
    """The likeliest of the answers that a question may have; no parser, and no answer that names nothing.

    Args:
        asked: The model.
        choices: Gives a row's.
    """

    def answer(rows: Sequence[Conversation], answered: Collection[int]) -> Iterator[tuple[int, Answer]]:
        return weigh_choices(
            asked.model, [_choices(asked, row, choices(row, "")) for row in rows], load_pixels=asked.load_pixels,
            batch_size=asked.batch_size, pad_token_id=asked.tokenizer.pad_token_id,  # type: ignore[arg-type]
            answered=answered,
        )  # fmt: skip

    return answer


def by_reasoned_likelihood(asked: Asked, sampling: Sampling, choices: Choose) -> Answerer:
    """The likeliest answer behind the reasons that the model writes first: for models that were trained to reason
    before they answer, to which an answer without reasons is unheard of.

    Args:
        asked: The model.
        sampling: How the reasons are drawn.
        choices: Gives a row's answers behind its reasons.
    """

    def answer(rows: Sequence[Conversation], answered: Collection[int]) -> Iterator[tuple[int, Answer]]:
        questions = [Question(asked.prompt(row), row.images) for row in rows]
        left = sorted((i for i in range(len(rows)) if i not in answered), key=lambda i: -len(questions[i].input_ids))
        encoded = EncodedImages(asked.model, asked.load_pixels, questions, left, times=2)
        common: dict[str, Any] = {
            "load_pixels": asked.load_pixels, "batch_size": asked.batch_size, "encoded": encoded,
        }  # fmt: skip
        for start in range(0, len(left), asked.batch_size):
            batch = left[start : start + asked.batch_size]
            written = generate_answers(
                asked.model, [questions[i] for i in batch], tokenizer=asked.tokenizer, sampling=sampling,
                stop_string=asked.template.stop_string, **common,
            )  # fmt: skip
            reasons = {batch[place]: found for place, found in written}
            yield from ((i, found) for i, found in reasons.items() if found.problem is not None)
            seen = [i for i in batch if reasons[i].problem is None]
            weighed = weigh_choices(
                asked.model, [_choices(asked, rows[i], choices(rows[i], reasons[i].text)) for i in seen],
                pad_token_id=asked.tokenizer.pad_token_id, **common,  # type: ignore[arg-type]
            )  # fmt: skip
            yield from ((seen[place], found) for place, found in weighed)

    return answer


def _choices(asked: Asked, row: Conversation, texts: Sequence[str]) -> Choices:
    """The row's choices, encoded.

    Raises:
        UserError: For choices that cannot be told apart, or one that is empty.
    """
    if not all(text.strip() for text in texts):
        raise UserError(f"--method loglik: {row.name} has an empty choice; fill it in, or take it out")
    encoded = [asked.with_answer(row, text) for text in texts]
    try:
        build_tree([ids for ids, _ in encoded])
    except ValueError:
        raise UserError(
            f"--method loglik: {row.name} has a choice that is the beginning of another, or the same; mend it"
        ) from None
    return Choices(texts, encoded, row.images)


def by_server(server: ChatServer, images: ImageSource, sampling: Sampling, stop_string: str | None) -> Answerer:
    """Answers of a server, several asked at once. Its own chat template writes the prompt, which for a model that this
    package exported is the one that was trained.

    Args:
        server: An OpenAI-compatible one.
        images: Opens the rows' images, which are sent with the questions.
        sampling: How tokens are drawn there.
        stop_string: Ends an answer where the template's stop is ordinary text.
    """

    def answer(rows: Sequence[Conversation], answered: Collection[int]) -> Iterator[tuple[int, Answer]]:
        sent: list[int] = []
        bad: list[tuple[int, Answer]] = []

        def requests() -> Iterator[ChatRequest]:
            for index in (i for i in range(len(rows)) if i not in answered):
                try:
                    messages = _server_messages(rows[index], images)
                except BadImageError as error:
                    bad.append((index, Answer("", problem=str(error), is_image=True)))
                    continue
                sent.append(index)
                yield ChatRequest(
                    messages, sampling.max_new_tokens, sampling.temperature, sampling.top_p, stop_string, sampling.seed
                )

        for place, found in ask(server, requests()):
            yield from (bad.pop() for _ in range(len(bad)))
            if isinstance(found, ChatFailure):
                yield sent[place], Answer("", problem=found.reason)
                continue
            text = found.text.split(stop_string)[0] if stop_string else found.text
            yield sent[place], Answer(text.strip())
        yield from bad

    return answer


def _server_messages(row: Conversation, images: ImageSource) -> list[dict[str, Any]]:
    """A row up to its last answer in OpenAI's form, each image where its placeholder stands."""
    names = iter(row.images)
    messages = []
    for turn in row.turns[:-1]:
        pieces = turn.text.split(IMAGE_PLACEHOLDER)
        content: list[dict[str, Any]] = []
        for place, piece in enumerate(pieces):
            if place:
                content.append(image_part(images.open(next(names))))
            piece = without_marks(piece)
            text = piece.strip("\n") if len(pieces) > 1 else piece  # the template puts a line break at an image
            if text:
                content.append({"type": "text", "text": text})
        messages.append({"role": turn.role, "content": content if len(pieces) > 1 else turn.shown})
    return messages


def reference_losses(asked: Asked, rows: Sequence[Conversation]) -> dict[int, tuple[float, int]]:
    """The loss of what the data answers.

    Args:
        asked: The model.
        rows: Conversations that end with an answer.

    Returns:
        Summed cross-entropy in nats and tokens of the last answer and its stop, by the row's index; none for a row
        whose image cannot be opened.
    """
    found = answer_losses(
        asked.model, [asked.with_answer(row, row.turns[-1].text) for row in rows], [row.images for row in rows],
        load_pixels=asked.load_pixels, batch_size=asked.batch_size,
        pad_token_id=asked.tokenizer.pad_token_id,  # type: ignore[arg-type]
    )  # fmt: skip
    return {index: (loss, tokens) for index, loss, tokens in found}


def shared(answerer: Answerer) -> Answerer:
    """Let each rank answer its share of the questions; all of them get every answer."""
    rank, ranks = this_rank()
    if ranks == 1:
        return answerer

    def answer(rows: Sequence[Any], but: Collection[int]) -> Iterator[tuple[int, Any]]:
        others = {i for i in range(len(rows)) if i % ranks != rank}
        for share in gather(list(answerer(rows, frozenset(but) | others))):
            yield from share

    return answer
