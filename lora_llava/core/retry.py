"""Reading from disks that fail now and then, as network disks do."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

_PASSING = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "ECONNRESET", "EHOSTDOWN", "ENETDOWN", "EREMOTEIO")
    if hasattr(errno, name)
}
"""What a network disk says while its server is away (errno(3))."""
PAUSES = (0.1, 1.0, 5.0, 15.0)
"""Seconds before each further try."""

Content = TypeVar("Content")


def patiently(read: Callable[[], Content], pauses: Sequence[float] = PAUSES) -> Content:
    """Read, and try again a few times where the disk fails in a way that may pass.

    Args:
        read: Reads.
        pauses: Seconds before each further try.

    Returns:
        What was read.

    Raises:
        OSError: What does not pass, at once; what may, after the last try.
    """
    for pause in pauses:
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            time.sleep(pause)
    return read()
