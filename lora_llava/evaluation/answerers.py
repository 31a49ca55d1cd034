"""Sources of answers: a local model that generates or scores choices by likelihood, or a server."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation, Message
from lora_llava.data.encode import IGNORE_INDEX, encode_conversation, encode_prompt
from lora_llava.data.images.image_sources import BadImageError, PixelLoader, SplitImages
from lora_llava.data.templates.spans import AnyTemplate
from lora_llava.data.tokens import Stop, stop_of
from lora_llava.data.typed import without_marks
from lora_llava.distributed.ranks import gather, this_rank
from lora_llava.inference.answer import Answer
from lora_llava.inference.batches import Batches
from lora_llava.inference.client.chat_request import ChatFailure, ChatRequest, image_part
from lora_llava.inference.client.client import ChatServer, ask
from lora_llava.inference.generate import generate_answers
from lora_llava.inference.likelihood import Choices, answer_losses, build_tree, weigh_choices
from lora_llava.inference.question import EncodedImages, Question
from lora_llava.inference.sampling import Sampling
from lora_llava.model.families.image_counts import TokensOf

Answerer = Callable[[Sequence[Conversation], Collection[int]], Iterator[tuple[int, Answer]]]
"""Answers the last question of each row, with the turns before it as history. Skips the rows of the given indices, and
yields index and answer in any order."""


@dataclass(frozen=True)
class Evaluator:
    """A local model with all that is needed to evaluate it.

    Attributes:
        model: A LLaVA, with or without an adapter.
        tokenizer: The tokenizer of its processor.
        template: The conversation template it was trained with.
        num_image_tokens: Counts the tokens of images, from `tokens_of`.
        load_pixels: Loads the images of the rows.
        batch_size: Most questions in one batch.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: AnyTemplate
    num_image_tokens: TokensOf
    load_pixels: PixelLoader
    batch_size: int

    @property
    def stop(self) -> Stop:
        """Where its answers end."""
        return stop_of(self.tokenizer, self.template.stop, self.template.stop_string)

    def prompt(self, row: Conversation) -> list[int]:
        """Encode a row up to the start of its last answer."""
        return encode_prompt(
            messages_of(row)[:-1],
            tokenizer=self.tokenizer,
            template=self.template,
            num_image_tokens=self.num_image_tokens(row.images),
        )

    def with_answer(self, row: Conversation, answer: str) -> tuple[list[int], list[int]]:
        """Encode a row that ends with this answer; only the answer has labels."""
        messages = [*messages_of(row)[:-1], {"role": "assistant", "content": answer}]
        encoded = encode_conversation(
            messages,
            tokenizer=self.tokenizer,
            template=self.template,
            num_image_tokens=self.num_image_tokens(row.images),
        )
        before = len(self.prompt(row))
        return encoded["input_ids"], [IGNORE_INDEX] * before + encoded["labels"][before:]


def messages_of(row: Conversation) -> list[Message]:
    """Return the turns of a row as messages."""
    return [{"role": turn.role, "content": turn.text} for turn in row.turns]


def by_generation(evaluator: Evaluator, sampling: Sampling) -> Answerer:
    """Return an answerer that lets the model generate.

    Args:
        evaluator: The model.
        sampling: How tokens are sampled.
    """

    def answer(rows: Sequence[Conversation], answered: Collection[int]) -> Iterator[tuple[int, Answer]]:
        questions = [Question(evaluator.prompt(row), row.images) for row in rows]
        return generate_answers(
            evaluator.model,
            questions,
            tokenizer=evaluator.tokenizer,
            load_pixels=evaluator.load_pixels,
            batch_size=evaluator.batch_size,
            sampling=sampling,
            stop=evaluator.stop,
            answered=answered,
        )

    return answer


Choose = Callable[[Conversation, str], Sequence[str]]
"""Returns the possible answers of a row, each after the text that precedes it."""


def by_likelihood(evaluator: Evaluator, choices: Choose) -> Answerer:
    """Return an answerer that picks the likeliest choice, so that no answer has to be parsed.

    Args:
        evaluator: The model.
        choices: Returns the choices of a row.
    """

    def answer(rows: Sequence[Conversation], answered: Collection[int]) -> Iterator[tuple[int, Answer]]:
        return weigh_choices(
            evaluator.model,
            [_choices(evaluator, row, choices(row, "")) for row in rows],
            load_pixels=evaluator.load_pixels,
            batch_size=evaluator.batch_size,
            pad_token_id=evaluator.tokenizer.pad_token_id,  # type: ignore[arg-type]
            answered=answered,
        )

    return answer


def by_reasoned_likelihood(evaluator: Evaluator, sampling: Sampling, choices: Choose) -> Answerer:
    """Return an answerer that lets the model generate its reasons, then picks the likeliest choice after them.

    It is for models trained to reason before they answer, to which a bare answer is out of distribution.

    Args:
        evaluator: The model.
        sampling: How the reasons are sampled.
        choices: Returns the choices of a row after its reasons.
    """

    def answer(rows: Sequence[Conversation], answered: Collection[int]) -> Iterator[tuple[int, Answer]]:
        questions = [Question(evaluator.prompt(row), row.images) for row in rows]
        left = sorted((i for i in range(len(rows)) if i not in answered), key=lambda i: -len(questions[i].input_ids))
        encoded = EncodedImages(evaluator.model, evaluator.load_pixels, questions, left, times=2)
        common: dict[str, Any] = {
            "load_pixels": evaluator.load_pixels,
            "batch_size": Batches(evaluator.batch_size),
            "encoded": encoded,
        }
        for start in range(0, len(left), evaluator.batch_size):
            batch = left[start : start + evaluator.batch_size]
            generated = generate_answers(
                evaluator.model,
                [questions[i] for i in batch],
                tokenizer=evaluator.tokenizer,
                sampling=sampling,
                stop=evaluator.stop,
                **common,
            )
            reasons = {batch[place]: found for place, found in generated}
            yield from ((i, found) for i, found in reasons.items() if found.problem is not None)
            seen = [i for i in batch if reasons[i].problem is None]
            likeliest = weigh_choices(
                evaluator.model,
                [_choices(evaluator, rows[i], choices(rows[i], reasons[i].text)) for i in seen],
                pad_token_id=evaluator.tokenizer.pad_token_id,
                **common,  # type: ignore[arg-type]
            )
            yield from ((seen[place], found) for place, found in likeliest)

    return answer


def _choices(evaluator: Evaluator, row: Conversation, texts: Sequence[str]) -> Choices:
    """Encode the choices of a row.

    Raises:
        UserError: If a choice is empty, or the same as another or its beginning.
    """
    if not all(text.strip() for text in texts):
        raise UserError(f"--method loglik: {row.name} has an empty choice; fill it in or remove it")
    encoded = [evaluator.with_answer(row, text) for text in texts]
    try:
        build_tree([ids for ids, _ in encoded])
    except ValueError:
        raise UserError(
            f"--method loglik: {row.name} has a choice that equals another or is the beginning of it; fix it"
        ) from None
    return Choices(texts, encoded, row.images)


def by_server(server: ChatServer, images: SplitImages, sampling: Sampling, stop_string: str | None) -> Answerer:
    """Return an answerer that queries a server with concurrent requests.

    The server's own chat template builds the prompt. For a model exported by this package it is the one used in
    training.

    Args:
        server: An OpenAI-compatible server.
        images: Opens the images of the rows, which are sent with the questions.
        sampling: How the server samples tokens.
        stop_string: Ends an answer if the template's stop is ordinary text.
    """

    def answer(rows: Sequence[Conversation], answered: Collection[int]) -> Iterator[tuple[int, Answer]]:
        sent: list[int] = []
        bad: list[tuple[int, Answer]] = []

        def requests() -> Iterator[ChatRequest]:
            for index in (i for i in range(len(rows)) if i not in answered):
                try:
                    messages = server_messages(rows[index], images)
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


def server_messages(row: Conversation, images: SplitImages) -> list[dict[str, Any]]:
    """Return a row up to its last answer as OpenAI messages, each image in place of its placeholder."""
    names = iter(row.images)
    messages = []
    for turn in row.turns[:-1]:
        pieces = turn.text.split(IMAGE_PLACEHOLDER)
        content: list[dict[str, Any]] = []
        for place, piece in enumerate(pieces):
            if place:
                content.append(image_part(images.open(next(names))))
            piece = without_marks(piece)
            text = piece.strip("\n") if len(pieces) > 1 else piece  # the template adds the line break at an image
            if text:
                content.append({"type": "text", "text": text})
        messages.append({"role": turn.role, "content": content if len(pieces) > 1 else turn.shown})
    return messages


def reference_losses(evaluator: Evaluator, rows: Sequence[Conversation]) -> dict[int, tuple[float, int]]:
    """Compute the loss of the reference answers.

    Args:
        evaluator: The model.
        rows: Conversations that end with the reference answer.

    Returns:
        By index of the row, the summed cross-entropy in nats and the number of tokens, over the last answer and its
        stop. A row whose image cannot be opened is left out.
    """
    found = answer_losses(
        evaluator.model,
        [evaluator.with_answer(row, row.turns[-1].text) for row in rows],
        [row.images for row in rows],
        load_pixels=evaluator.load_pixels,
        batch_size=evaluator.batch_size,
        pad_token_id=evaluator.tokenizer.pad_token_id,  # type: ignore[arg-type]
    )
    return {index: (loss, tokens) for index, loss, tokens, _ in found}


def split_over_ranks(answerer: Answerer) -> Answerer:
    """Return an answerer that splits the questions over the ranks; every rank receives all answers."""
    rank, ranks = this_rank()
    if ranks == 1:
        return answerer

    def answer(rows: Sequence[Any], answered: Collection[int]) -> Iterator[tuple[int, Any]]:
        others = {i for i in range(len(rows)) if i % ranks != rank}
        for share in gather(list(answerer(rows, frozenset(answered) | others))):
            yield from share

    return answer
