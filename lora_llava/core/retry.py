"""Retry reads that fail temporarily, as on network disks."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

_TEMPORARY = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "ECONNRESET", "EHOSTDOWN", "ENETDOWN", "EREMOTEIO")
    if hasattr(errno, name)
}
"""Errors of a network disk whose server is unreachable (errno(3))."""
PAUSES = (0.1, 1.0, 5.0, 15.0)
"""Seconds before each further try."""

Content = TypeVar("Content")


def retry(read: Callable[[], Content], pauses: Sequence[float] = PAUSES) -> Content:
    """Read, and try again if the disk fails temporarily.

    Args:
        read: Reads and returns the content.
        pauses: Seconds before each further try.

    Returns:
        What was read.

    Raises:
        OSError: At once if the failure is not temporary, else after the last try.
    """
    for pause in pauses:
        try:
            return read()
        except OSError as error:
            if error.errno not in _TEMPORARY:
                raise
            time.sleep(pause)
    return read()
