"""Wait for a server that is down until it responds again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from lora_llava.core.errors import UserError
from lora_llava.core.progress import note_in_bars, print_beside_bars

DOWN = frozenset((502, 503, 504))
"""Statuses of a gateway whose server is down, and of a server that still loads its model (llama.cpp: 503)."""
_LONGEST_PAUSE = 5.0


class Outage:
    """A wait for a server that all requests in flight share.

    Args:
        url: The server, for messages.
        limit: Most seconds to wait.
        pause: Seconds before the second probe, doubled after each, up to 5.
        responds: Probes the server.
    """

    def __init__(self, url: str, limit: float, pause: float, responds: Callable[[], Awaitable[bool]]) -> None:
        self.url, self.limit, self.pause, self.responds = url, limit, pause, responds
        self._lock = asyncio.Lock()
        self._back_at = 0.0

    async def wait(self, failed: float) -> bool:
        """Wait until the server responds.

        Args:
            failed: When the request failed, in seconds of `time.monotonic`.

        Returns:
            Whether the server was down; False if it responds at once, so that the failure has another cause.

        Raises:
            UserError: If it does not respond within the limit.
        """
        async with self._lock:
            if self._back_at >= failed:
                return True  # another request has waited
            if await self.responds():
                return False
            print_beside_bars(f"{self.url} is down; waiting up to {self.limit:,.0f} s for it")
            try:
                await self._until_back(failed)
            finally:
                note_in_bars("")
            self._back_at = time.monotonic()
            print_beside_bars(f"{self.url} responds again after {self._back_at - failed:,.0f} s; the work goes on")
            return True

    async def _until_back(self, failed: float) -> None:
        pause = self.pause
        while True:
            passed = time.monotonic() - failed
            if passed > self.limit:
                raise UserError(
                    f"{self.url} cannot be reached for {passed:,.0f} s; start the server and run the same command "
                    "again, which keeps all answers"
                )
            note_in_bars(f"waiting for the server ({passed:,.0f} s)")
            await asyncio.sleep(min(pause, max(self.limit - passed, 0.01)))
            if await self.responds():
                return
            pause = min(pause * 2, _LONGEST_PAUSE)
