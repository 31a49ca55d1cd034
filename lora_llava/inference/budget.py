"""What requests may cost, and how many there may be."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field

from lora_llava.core.errors import UserError
from lora_llava.inference.chat_request import ChatAnswer, ChatFailure, ChatRequest

_WORDS = re.compile(rb" ?[A-Za-z]+")
_BYTES_PER_TOKEN = 3
"""Of English words with the space before them: Llama's tokenizer has 4.6, OpenAI's more."""


def estimate_text_tokens(text: str) -> int:
    """About how many tokens a text has at most, by its UTF-8 bytes.

    English words count a token for three bytes. Every other byte counts as a token: digits and punctuation, of which
    coordinates are made, mostly are one each, and of other scripts a tokenizer that knows a letter badly makes a token
    of each byte.

    Args:
        text: Any.

    Returns:
        At least what common tokenizers make of it; for English a third more.
    """
    content = text.encode("utf-8", "surrogatepass")
    words = sum(map(len, _WORDS.findall(content)))
    return math.ceil(words / _BYTES_PER_TOKEN) + len(content) - words


def estimate_tokens(request: ChatRequest) -> int:
    """About how many tokens a request's messages and its schema have at most; see `estimate_text_tokens`."""
    schema = estimate_text_tokens(json.dumps(request.response_format)) if request.response_format else 0
    return schema + sum(estimate_text_tokens(str(message["content"])) for message in request.messages)


@dataclass(frozen=True)
class Charge:
    """What one try at a request cost.

    Attributes:
        prompt_tokens: By the server's count, else by the estimate.
        completion_tokens: The same of what came back.
        usd: None where prices are unknown.
    """

    prompt_tokens: int
    completion_tokens: int
    usd: float | None


@dataclass
class Budget:
    """What a run may ask, and what it has asked.

    Every try counts, answered or not: a server works on an answer that is malformed or comes too late, too.

    Attributes:
        price_in: USD for a million tokens to the model that is asked; None where unknown.
        price_out: The same of tokens from it.
        max_cost: USD that may be spent, `before` included.
        max_requests: Requests that this run may send, further tries included.
        requests: Sent so far.
        spent: USD for all tries of this run that have ended.
        before: USD that earlier runs under a cap spent on the same work.
        exhausted: Whether a request was refused while none was on its way: no other will be sent.

    Raises:
        UserError: For a cap on cost without prices, or a value that cannot be.
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
                raise UserError(f"--{name.replace('_', '-')} is {value}; give 0 or more USD")
        if (self.price_in is None) != (self.price_out is None):
            raise UserError("--price-in and --price-out go together: USD for a million tokens, each way")
        if self.max_cost is not None and self.price_in is None:
            raise UserError("--max-cost needs the model's prices; give --price-in and --price-out")

    @property
    def capped(self) -> bool:
        """Whether there is a cap on cost."""
        return self.max_cost is not None

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """USD; 0 where the prices are unknown."""
        return (tokens_in * (self.price_in or 0.0) + tokens_out * (self.price_out or 0.0)) / 1e6

    def most(self, request: ChatRequest) -> float:
        """USD that one try at a request costs at most: all the tokens it allows, its own by the estimate."""
        return self.cost(estimate_tokens(request), request.max_tokens)

    def take(self, key: str, request: ChatRequest) -> bool:
        """Set aside what a request costs at most.

        Returns:
            Whether it may be sent; where not, nothing is set aside.
        """
        taken, many = self._set(key, request)
        if not taken:
            self.exhausted = many or not self._reserved
        return taken

    def again(self, key: str, request: ChatRequest, failure: ChatFailure) -> bool:
        """Put what a failed try did cost in the place of what was set aside, and set aside another.

        Returns:
            Whether the request may be sent once more; where not, it still has to be settled, at no further cost.
        """
        self.settle(key, request, failure)
        taken, _ = self._set(key, request)
        if not taken:
            self._reserved[key] = 0.0
        return taken

    def holds(self, key: str) -> bool:
        """Whether something is set aside under a key."""
        return key in self._reserved

    def _set(self, key: str, request: ChatRequest) -> tuple[bool, bool]:
        """Whether a try was set aside, and whether there were too many requests for it."""
        most = self.most(request)
        many = self.max_requests is not None and self.requests >= self.max_requests
        if many or (self.max_cost is not None and self.before + self.spent + self._set_aside + most > self.max_cost):
            return False, many
        self.requests += 1
        self._reserved[key] = most
        self._set_aside += most
        return True, False

    def settle(self, key: str, request: ChatRequest, found: ChatAnswer | ChatFailure | None) -> Charge:
        """Put what a try did cost in the place of what was set aside.

        Args:
            key: As it was taken.
            request: As it was taken.
            found: What came of it; None where nobody waited for it to end.

        Returns:
            What it did cost.
        """
        self._set_aside -= self._reserved.pop(key)
        self._set_aside *= bool(self._reserved)  # nothing is left of rounding
        charge = self.charge_of(request, found)
        self.spent += charge.usd or 0.0
        return charge

    def charge_of(self, request: ChatRequest, found: ChatAnswer | ChatFailure | None) -> Charge:
        """What a try did cost.

        The server's count of tokens goes before the estimate. What failed without one is taken to have cost the most
        that it may: the server can have worked on it to the end.
        """
        if isinstance(found, ChatAnswer):
            tokens_in = found.prompt_tokens or estimate_tokens(request)
            tokens_out = found.completion_tokens or estimate_text_tokens(found.text)
        else:
            told_in, told_out = (found.prompt_tokens, found.completion_tokens) if found else (None, None)
            tokens_in = estimate_tokens(request) if told_in is None else told_in
            tokens_out = request.max_tokens if told_out is None else told_out
        return Charge(tokens_in, tokens_out, None if self.price_in is None else self.cost(tokens_in, tokens_out))

    def why_stopped(self) -> str:
        """Which cap was reached and what to change, for a person; nothing where none was."""
        if not self.exhausted:
            return ""
        if self.max_requests is not None and self.requests >= self.max_requests:
            return "the cap was reached; the same command goes on"
        return "the cap was reached; the same command goes on with a higher --max-cost"
