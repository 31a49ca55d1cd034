"""Progress of long work: a bar on a terminal or in a notebook, one line every half minute in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

LINE_INTERVAL = 30.0
"""Seconds between two lines in a log file."""


class LineProgress(tqdm):  # type: ignore[type-arg]
    """Progress in lines: printed every half minute, and at the end where the work took longer than that.

    It has tqdm's interface. `leave=False` has no effect on lines that were printed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._started = self._printed = time.monotonic()
        kwargs |= {"mininterval": 1.0, "maxinterval": 1.0, "dynamic_ncols": False, "ncols": 0, "position": 0}
        super().__init__(*args, **kwargs)

    disable: bool

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print a line where the last one is half a minute old."""
        if time.monotonic() - self._printed >= LINE_INTERVAL:
            self._print_line()
        return True

    def clear(self, nolock: bool = False) -> None:
        """Lines stay."""

    def moveto(self, n: int) -> None:
        """Lines have no cursor."""

    def close(self) -> None:
        """End; the last line reports the total of work that printed lines before."""
        if self.disable:
            return
        if self._printed > self._started:
            self._print_line()
        self.disable = True  # tqdm.close without its carriage return
        self._decr_instances(self)

    def _print_line(self) -> None:
        self._printed = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()


def progress_bar(*args: Any, **kwargs: Any) -> tqdm[Any]:
    """Make a progress bar that fits where stderr goes; arguments are tqdm's.

    Returns:
        tqdm's own bar on a terminal and in a notebook, else a `LineProgress`.
    """
    kind = tqdm if sys.stderr.isatty() or "ipykernel" in sys.modules else LineProgress
    return kind(*args, **{"dynamic_ncols": True} | kwargs)


def note_in_bars(text: str) -> None:
    """Show a note behind all progress bars that are open; an empty text removes it."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.set_postfix_str(text)


def print_beside_bars(text: str) -> None:
    """Print a line to stderr without breaking the progress bars that are open."""
    tqdm.write(text, file=sys.stderr)
