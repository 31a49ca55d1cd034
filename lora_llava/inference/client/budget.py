"""Caps on the cost and the number of requests."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field

from lora_llava.core.errors import UserError
from lora_llava.inference.client.chat_request import ChatAnswer, ChatFailure, ChatRequest

_WORDS = re.compile(rb" ?[A-Za-z]+")
_BYTES_PER_TOKEN = 3
"""For English words with the space before them: Llama's tokenizer has 4.6 bytes per token, OpenAI's more."""


def estimate_text_tokens(text: str) -> int:
    """Estimate an upper bound of a text's tokens from its UTF-8 bytes.

    English words count as one token per three bytes. Every other byte counts as a token: digits and punctuation, as in
    coordinates, are mostly one token each, and tokenizers split a rare letter of other scripts into its bytes.

    Args:
        text: Any text.

    Returns:
        At least the count of common tokenizers; about a third more for English.
    """
    content = text.encode("utf-8", "surrogatepass")
    words = sum(map(len, _WORDS.findall(content)))
    return math.ceil(words / _BYTES_PER_TOKEN) + len(content) - words


def estimate_tokens(request: ChatRequest) -> int:
    """Estimate an upper bound of the tokens of a request's messages and schema; see `estimate_text_tokens`."""
    schema = estimate_text_tokens(json.dumps(request.response_format)) if request.response_format else 0
    return schema + sum(estimate_text_tokens(str(message["content"])) for message in request.messages)


@dataclass(frozen=True)
class Charge:
    """The cost of one try of a request.

    Attributes:
        prompt_tokens: The server's count, else the estimate.
        completion_tokens: The same for the answer.
        usd: None if prices are unknown.
    """

    prompt_tokens: int
    completion_tokens: int
    usd: float | None


@dataclass
class Budget:
    """The caps of a run, and what it has spent and reserved.

    Every try counts, answered or not: a server also computes an answer that is malformed or arrives too late.

    Attributes:
        price_in: USD for a million prompt tokens; None if unknown.
        price_out: USD for a million completion tokens.
        max_cost: Most USD to spend, `before` included.
        max_requests: Most requests of this run, further tries included.
        requests: Sent so far.
        spent: USD of all finished tries of this run.
        before: USD that earlier runs under a cap spent on the same work.
        exhausted: Whether a request was refused while none was in flight, so that no other will be sent.

    Raises:
        UserError: For a cap on cost without prices, or an invalid value.
    """

    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None
    max_requests: int | None = None
    requests: int = 0
    spent: float = 0.0
    before: float = 0.0
    exhausted: bool = False
    _reserved: dict[str, float] = field(default_factory=dict)
    _reserved_usd: float = 0.0

    def __post_init__(self) -> None:
        for name in ("price_in", "price_out", "max_cost"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} is {value}; set it to 0 or more USD")
        if (self.price_in is None) != (self.price_out is None):
            raise UserError("--price-in and --price-out go together; set both, in USD per million tokens")
        if self.max_cost is not None and self.price_in is None:
            raise UserError("--max-cost needs the model's prices; set --price-in and --price-out")

    @property
    def capped(self) -> bool:
        """Whether the run has a cap on cost."""
        return self.max_cost is not None

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Return the cost in USD; 0 if prices are unknown."""
        return (tokens_in * (self.price_in or 0.0) + tokens_out * (self.price_out or 0.0)) / 1e6

    def most(self, request: ChatRequest) -> float:
        """Return the most USD that one try can cost: its estimated prompt and an answer of the longest length."""
        return self.cost(estimate_tokens(request), request.max_tokens)

    def take(self, key: str, request: ChatRequest) -> bool:
        """Reserve the most that a request can cost.

        Returns:
            Whether it may be sent; if not, nothing is reserved.
        """
        reserved, too_many = self._reserve(key, request)
        if not reserved:
            self.exhausted = too_many or not self._reserved
        return reserved

    def again(self, key: str, request: ChatRequest, failure: ChatFailure) -> bool:
        """Replace the reservation of a failed try by its actual cost, and reserve another try.

        Returns:
            Whether the request may be sent once more; if not, it still has to be settled, at no further cost.
        """
        self.settle(key, request, failure)
        reserved, _ = self._reserve(key, request)
        if not reserved:
            self._reserved[key] = 0.0
        return reserved

    def holds(self, key: str) -> bool:
        """Check whether a reservation exists for a key."""
        return key in self._reserved

    def _reserve(self, key: str, request: ChatRequest) -> tuple[bool, bool]:
        """Return whether a try was reserved, and whether the cap on requests was reached."""
        most = self.most(request)
        too_many = self.max_requests is not None and self.requests >= self.max_requests
        total = self.before + self.spent + self._reserved_usd + most
        if too_many or (self.max_cost is not None and total > self.max_cost):
            return False, too_many
        self.requests += 1
        self._reserved[key] = most
        self._reserved_usd += most
        return True, False

    def settle(self, key: str, request: ChatRequest, found: ChatAnswer | ChatFailure | None) -> Charge:
        """Replace the reservation of a try by its actual cost.

        Args:
            key: As passed to `take`.
            request: As passed to `take`.
            found: The result; None if the run stopped before it arrived.

        Returns:
            The actual cost.
        """
        self._reserved_usd -= self._reserved.pop(key)
        self._reserved_usd *= bool(self._reserved)  # drop the rounding error
        charge = self.charge_of(request, found)
        self.spent += charge.usd or 0.0
        return charge

    def charge_of(self, request: ChatRequest, found: ChatAnswer | ChatFailure | None) -> Charge:
        """Return the cost of a try.

        The server's token counts take precedence over the estimate. A failure without counts is charged the most that
        the try can cost, because the server may have completed it.
        """
        if isinstance(found, ChatAnswer):
            tokens_in = found.prompt_tokens or estimate_tokens(request)
            tokens_out = found.completion_tokens or estimate_text_tokens(found.text)
        else:
            reported_in, reported_out = (found.prompt_tokens, found.completion_tokens) if found else (None, None)
            tokens_in = estimate_tokens(request) if reported_in is None else reported_in
            tokens_out = request.max_tokens if reported_out is None else reported_out
        return Charge(tokens_in, tokens_out, None if self.price_in is None else self.cost(tokens_in, tokens_out))

    def why_stopped(self) -> str:
        """Return which cap was reached and how to resume, for the user; empty if none was."""
        if not self.exhausted:
            return ""
        if self.max_requests is not None and self.requests >= self.max_requests:
            return "the cap was reached; the same command resumes"
        return "the cap was reached; the same command resumes with a higher --max-cost"
