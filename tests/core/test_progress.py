"""Progress in a log file: one line every half minute; nothing for short work."""

from __future__ import annotations

import io
import sys

import pytest
from tqdm import tqdm

from lora_llava.core import progress
from lora_llava.core.progress import LineProgress, progress_bar


class Clock:
    now = 1000.0

    @classmethod
    def monotonic(cls) -> float:
        return cls.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(progress, "time", Clock)
    return Clock


def test_a_log_file_gets_a_line_every_half_minute(clock: type[Clock]) -> None:
    log = io.StringIO()
    with LineProgress(total=600, desc="stage 2", unit="step", file=log) as bar:
        bar._time = clock.time
        for _ in range(600):
            clock.now += 0.2
            bar.update()
            bar.refresh()
    lines = log.getvalue().splitlines()
    assert len(lines) == 5  # after 30, 60, 90 and 120 seconds, and at the end
    assert all(line.startswith("stage 2:") and "\r" not in line for line in lines)
    assert "600/600" in lines[-1]


def test_short_work_prints_nothing(clock: type[Clock]) -> None:
    log = io.StringIO()
    assert list(LineProgress(range(5), file=log)) == [0, 1, 2, 3, 4]
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(total=2) as bar:
        assert type(bar) is tqdm
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(total=2) as bar:
        assert type(bar) is LineProgress
