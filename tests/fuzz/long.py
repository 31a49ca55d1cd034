"""Fuzz for a while: `python tests/fuzz/long.py --minutes 10 [--target NAME]`; prints a table of crashes."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from tests.fuzz.targets import TARGETS, attempt

_AT_ONCE = 200


def fuzz(name: str, seconds: float) -> tuple[int, dict[str, str]]:
    """Run a target until the time is up.

    Args:
        name: Of `TARGETS`.
        seconds: How long; the examples under way are finished.

    Returns:
        Examples, and a traceback by where each kind of crash was raised.
    """
    end, count = time.monotonic() + seconds, 0
    crashes: dict[str, str] = {}

    @settings(
        max_examples=_AT_ONCE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        nonlocal count
        value = data.draw(TARGETS[name].values)
        if time.monotonic() > end:
            return
        count += 1
        try:
            attempt(TARGETS[name], value)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            crashes.setdefault(where, f"{traceback.format_exc()}\nof {value!r:.2000}")

    while time.monotonic() < end:
        run()
    return count, crashes


def main() -> int:
    """Run the targets one after another; 1 where one crashed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for each target")
    parser.add_argument("--target", choices=list(TARGETS), help="default: all")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    table = Table("target", "examples", "crashes")
    found: dict[str, str] = {}
    for name in [args.target] if args.target else TARGETS:
        count, crashes = fuzz(name, 60 * args.minutes)
        table.add_row(name, f"{count:,}", str(len(crashes)))
        found |= {f"{name}: {where}": text for where, text in crashes.items()}
        for where, text in crashes.items():
            print(f"{name}: {where}\n{text}\n", flush=True)
    Console().print(table)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
