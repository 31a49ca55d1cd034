"""Before an evaluation by a server: whether its prompts have the tokens of training, and the field that adds BOS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_llava.data.conversation import Conversation
from lora_llava.data.encode import encode_prompt
from lora_llava.data.images.image_sources import BadImageError, SplitImages
from lora_llava.data.templates.spans import AnyTemplate
from lora_llava.evaluation.answerers import messages_of, server_messages
from lora_llava.inference.client.chat_request import ChatAnswer, ChatRequest
from lora_llava.inference.client.client import ChatServer, ask
from lora_llava.inference.served.prompt_pairs import PromptPair, prompt_fault
from lora_llava.model.families.image_counts import TokensOf

BOS_FIELD = {"add_special_tokens": True}
"""vLLM's and SGLang's field of a chat completion; llama.cpp ignores it, transformers serve refuses it with HTTP 422."""


@dataclass(frozen=True)
class SentPrompt:
    """A question to compare prompts with.

    Attributes:
        request: As it is sent.
        ids: Its prompt here.
        images: Number of its images.
    """

    request: ChatRequest
    ids: Sequence[int]
    images: int


def sent_prompts(
    rows: Sequence[Conversation], images: SplitImages, tokenizer: Any, template: AnyTemplate, num_image_tokens: TokensOf
) -> list[SentPrompt]:
    """Choose the first question without an image and the first one whose images can be opened.

    Args:
        rows: The questions.
        images: Opens their images.
        tokenizer: The model's tokenizer.
        template: Its conversation template.
        num_image_tokens: Counts the tokens of images, from `tokens_of`.
    """
    found: dict[bool, SentPrompt] = {}
    for row in rows:
        if bool(row.images) in found:
            continue
        try:
            request = ChatRequest(server_messages(row, images), 1)
        except BadImageError:
            continue
        ids = encode_prompt(
            messages_of(row)[:-1],
            tokenizer=tokenizer,
            template=template,
            num_image_tokens=num_image_tokens(row.images),
        )
        found[bool(row.images)] = SentPrompt(request, ids, len(row.images))
    return list(found.values())


def match_bos(
    server: ChatServer, prompts: Sequence[SentPrompt], bos: Sequence[int], folder: str
) -> tuple[ChatServer, list[str]]:
    """Ask a server to add BOS if its prompts lack it, and check the number of their tokens.

    A server that tokenizes the chat template's text without special tokens loses BOS. Where it takes the field
    `add_special_tokens`, that is added to every request.

    Args:
        server: The server, with its model named.
        prompts: A few questions, each asked for one token.
        bos: Ids that the tokenizer puts in front of a text.
        folder: The model's folder, for messages.

    Returns:
        The server, with the field where it helps, and lines to report.
    """
    pairs = _count(server, prompts)
    fault = prompt_fault(pairs, bos, None)
    if fault is None:
        return server, []
    if fault == "missing BOS":
        adding = replace(server, fields={**server.fields, **BOS_FIELD})
        if all(pair.equal for pair in _count(adding, prompts)):
            return adding, ["the server's prompts lack BOS: add_special_tokens=true is sent with every question"]
    return server, [_warning(fault, pairs, folder)]


def _count(server: ChatServer, prompts: Sequence[SentPrompt]) -> list[PromptPair]:
    """Return the prompts' tokens here and on the server; 0 for one that is not answered."""
    counts = {
        place: found.prompt_tokens
        for place, found in ask(
            replace(server, retries=0), [replace(prompt.request, max_tokens=1) for prompt in prompts]
        )
        if isinstance(found, ChatAnswer)
    }
    return [PromptPair(prompt.ids, prompt.images, counts.get(place, 0)) for place, prompt in enumerate(prompts)]


def _warning(fault: str, pairs: Sequence[PromptPair], folder: str) -> str:
    pair = next(pair for pair in pairs if pair.equal is False)
    return (
        f"warning: a prompt has {pair.count} tokens on the server and {len(pair.ours)} here ({fault}), so that the "
        f"scores are not those of the model; lora-llava verify {folder} --server URL names the cause and its fix"
    )
