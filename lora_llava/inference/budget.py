"""What requests may cost, and how many there may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lora_llava.errors import UserError
from lora_llava.inference.chat_request import ChatAnswer, ChatRequest

_CHARACTERS_PER_TOKEN = 4
"""OpenAI's rule of thumb for English text: an estimate, not a count."""


def estimate_tokens(request: ChatRequest) -> int:
    """About how many tokens a request's messages have: a token for four characters."""
    characters = sum(len(str(message["content"])) for message in request.messages)
    return math.ceil(characters / _CHARACTERS_PER_TOKEN)


@dataclass
class Budget:
    """What a run may ask, and what it has asked.

    Attributes:
        price_in: USD for a million tokens to the model that is asked; None where unknown.
        price_out: The same of tokens from it.
        max_cost: USD that this run may spend.
        max_requests: Requests that this run may send; a try again after a failure is not counted.
        requests: Sent so far.
        spent: USD for the answers so far, by the server's count of tokens, or the estimate where it gives none.
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

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """USD; 0 where the prices are unknown."""
        return (tokens_in * (self.price_in or 0.0) + tokens_out * (self.price_out or 0.0)) / 1e6

    def most(self, request: ChatRequest) -> float:
        """USD that a request costs at most: all the tokens it allows, its own by the estimate."""
        return self.cost(estimate_tokens(request), request.max_tokens)

    def take(self, key: str, request: ChatRequest) -> bool:
        """Set aside what a request costs at most.

        Returns:
            Whether it may be sent; where not, nothing is set aside.
        """
        most = self.most(request)
        many = self.max_requests is not None and self.requests >= self.max_requests
        dear = self.max_cost is not None and self.spent + self._set_aside + most > self.max_cost
        if many or dear:
            self.exhausted = many or not self._reserved
            return False
        self.requests += 1
        self._reserved[key] = most
        self._set_aside += most
        return True

    def settle(self, key: str, request: ChatRequest, answer: ChatAnswer | None) -> None:
        """Put what an answer did cost in the place of what was set aside; a failure is taken to cost nothing."""
        self._set_aside -= self._reserved.pop(key)
        self._set_aside *= bool(self._reserved)  # nothing is left of rounding
        if answer is not None:
            self.spent += self.price_of(request, answer) or 0.0

    def price_of(self, request: ChatRequest, answer: ChatAnswer) -> float | None:
        """USD that an answer did cost, by the server's count of tokens or the estimate; None without prices."""
        if self.price_in is None:
            return None
        tokens_in = answer.prompt_tokens or estimate_tokens(request)
        tokens_out = answer.completion_tokens or math.ceil(len(answer.text) / _CHARACTERS_PER_TOKEN)
        return self.cost(tokens_in, tokens_out)
