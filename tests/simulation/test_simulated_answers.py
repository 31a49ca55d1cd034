"""What a batch of questions is planned to need is what torch's allocator would hand out, up to 10% more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from tests.simulation.settings import Setting

CASES = [(1024, 1, True), (1024, 1, False), (16, 2048, True)]
"""Tokens of the prompt and of the answer, and whether there is an adapter; the last answer outweighs its prompt."""


@pytest.mark.more
def test_batches_of_questions_hold(fake_cuda: Callable[..., list[dict[str, Any]]]) -> None:
    setting = asdict(Setting("7B", layers=2))
    jobs = [
        {"kind": "answers", "setting": setting, "rows": 8, "tokens": tokens, "new_tokens": new, "adapter": adapter}
        for tokens, new, adapter in CASES
    ]
    for case, found in zip(CASES, fake_cuda(jobs), strict=True):
        share = found["planned"] / max(found["first"], found["last"])
        print(f"{case}: planned over counted {share:.4f}")
        assert 1 <= share <= 1.1, (case, found)
        assert (found["last"] > found["first"]) == (case[1] > case[0])
