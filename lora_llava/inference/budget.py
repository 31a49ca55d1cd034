"""Caps on the cost and the number of requests to a server."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field

from lora_llava.core.errors import UserError
from lora_llava.inference.chat_request import ChatAnswer, ChatFailure, ChatRequest

_WORDS = re.compile(rb" ?[A-Za-z]+")
_BYTES_PER_TOKEN = 3
"""For English words with the space before them; Llama's tokenizer averages 4.6, OpenAI's more."""


def estimate_text_tokens(text: str) -> int:
    """Estimate an upper bound on the tokens of a text from its UTF-8 bytes.

    English words count as one token per three bytes, and every other byte as one token. Digits and punctuation, which
    make up coordinates, are mostly one token each. In other scripts, a tokenizer may spend one token on each byte of a
    rare letter.

    Args:
        text: Any text.

    Returns:
        At least the count of common tokenizers; for English about a third more.
    """
    content = text.encode("utf-8", "surrogatepass")
    words = sum(map(len, _WORDS.findall(content)))
    return math.ceil(words / _BYTES_PER_TOKEN) + len(content) - words


def estimate_tokens(request: ChatRequest) -> int:
    """Estimate an upper bound on the tokens of a request's messages and schema; see `estimate_text_tokens`."""
    schema = estimate_text_tokens(json.dumps(request.response_format)) if request.response_format else 0
    return schema + sum(estimate_text_tokens(str(message["content"])) for message in request.messages)


@dataclass(frozen=True)
class Charge:
    """The cost of one attempt at a request.

    Attributes:
        prompt_tokens: Input tokens, counted by the server or else estimated.
        completion_tokens: Output tokens, likewise.
        usd: The cost in USD; None if the prices are unknown.
    """

    prompt_tokens: int
    completion_tokens: int
    usd: float | None


@dataclass
class Budget:
    """The caps of a run, and what it has used of them.

    Every attempt counts, answered or not, because a server also charges for answers that are malformed or too late.

    Attributes:
        price_in: USD per million input tokens; None if unknown.
        price_out: USD per million output tokens; None if unknown.
        max_cost: Most USD to spend, `before` included; None for no cap.
        max_requests: Most requests of this run, retries included; None for no cap.
        requests: Requests sent so far.
        spent: USD for all finished attempts of this run.
        before: USD that earlier capped runs spent on the same work.
        exhausted: Whether a request was rejected while none was in flight, so that no other will be sent.

    Raises:
        UserError: For a cap on cost without prices, or for a value out of range.
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
    _set_aside: float = 0.0

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
        """Whether the cost is capped."""
        return self.max_cost is not None

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Return the cost of tokens in USD; 0 if the prices are unknown."""
        return (tokens_in * (self.price_in or 0.0) + tokens_out * (self.price_out or 0.0)) / 1e6

    def most(self, request: ChatRequest) -> float:
        """Return the most that one attempt may cost in USD: its estimated input and all the output it allows."""
        return self.cost(estimate_tokens(request), request.max_tokens)

    def take(self, key: str, request: ChatRequest) -> bool:
        """Reserve the most that a request may cost.

        Returns:
            Whether it may be sent; if not, nothing is reserved.
        """
        taken, many = self._set(key, request)
        if not taken:
            self.exhausted = many or not self._reserved
        return taken

    def again(self, key: str, request: ChatRequest, failure: ChatFailure) -> bool:
        """Replace the reservation of a failed attempt by its real cost, and reserve a retry.

        Returns:
            Whether the request may be sent again; if not, it must still be settled, at no further cost.
        """
        self.settle(key, request, failure)
        taken, _ = self._set(key, request)
        if not taken:
            self._reserved[key] = 0.0
        return taken

    def holds(self, key: str) -> bool:
        """Check whether a reservation exists under a key."""
        return key in self._reserved

    def _set(self, key: str, request: ChatRequest) -> tuple[bool, bool]:
        """Reserve an attempt; return whether that succeeded, and whether the cap on requests prevented it."""
        most = self.most(request)
        many = self.max_requests is not None and self.requests >= self.max_requests
        if many or (self.max_cost is not None and self.before + self.spent + self._set_aside + most > self.max_cost):
            return False, many
        self.requests += 1
        self._reserved[key] = most
        self._set_aside += most
        return True, False

    def settle(self, key: str, request: ChatRequest, found: ChatAnswer | ChatFailure | None) -> Charge:
        """Replace a reservation by the real cost of its attempt.

        Args:
            key: The key passed to `take`.
            request: The request passed to `take`.
            found: The answer or failure; None if the attempt was abandoned.

        Returns:
            The real cost.
        """
        self._set_aside -= self._reserved.pop(key)
        self._set_aside *= bool(self._reserved)  # drop what rounding leaves
        charge = self.charge_of(request, found)
        self.spent += charge.usd or 0.0
        return charge

    def charge_of(self, request: ChatRequest, found: ChatAnswer | ChatFailure | None) -> Charge:
        """Compute the real cost of an attempt.

        The server's token count takes precedence over the estimate. A failure without a count is charged the most that
        it may cost, because the server may have finished the work.
        """
        if isinstance(found, ChatAnswer):
            tokens_in = found.prompt_tokens or estimate_tokens(request)
            tokens_out = found.completion_tokens or estimate_text_tokens(found.text)
        else:
            counted_in, counted_out = (found.prompt_tokens, found.completion_tokens) if found else (None, None)
            tokens_in = estimate_tokens(request) if counted_in is None else counted_in
            tokens_out = request.max_tokens if counted_out is None else counted_out
        return Charge(tokens_in, tokens_out, None if self.price_in is None else self.cost(tokens_in, tokens_out))

    def why_stopped(self) -> str:
        """Return a message on the cap that was reached and how to resume; "" if none was."""
        if not self.exhausted:
            return ""
        if self.max_requests is not None and self.requests >= self.max_requests:
            return "the cap was reached; run the same command again to resume"
        return "the cap was reached; run the same command again with a higher --max-cost to resume"
