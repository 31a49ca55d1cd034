"""A paged optimizer's states after a resume: in paged memory again, with the same next steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from lora_llava.runs.state_files import load_state, save_state
from lora_llava.runs.trainer_state import page_states


class PagedHere(bitsandbytes.optim.PagedAdamW8bit):
    """bitsandbytes' optimizer with a CPU's memory as paged memory: what `get_state_buffer` makes is marked."""

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        buffer: Any = torch.zeros_like(p, dtype=dtype)
        buffer.is_paged = True
        return buffer  # type: ignore[no-any-return]

    def prefetch_state(self, p: torch.Tensor) -> None:
        assert all(self.state[p][name].is_paged for name in ("state1", "state2"))


def optimizer_of(parameter: torch.nn.Parameter) -> Any:
    return PagedHere([parameter], lr=0.01)


def steps(parameter: torch.nn.Parameter, optimizer: Any, gradients: Iterator[torch.Tensor], count: int) -> None:
    for _ in range(count):
        parameter.grad = next(gradients)
        optimizer.step()


@pytest.mark.parametrize("paged", [True, False])
def test_loaded_states_are_paged_again(tmp_path: Path, paged: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(128, 64, generator=generator) for _ in range(6)]
    whole = torch.nn.Parameter(torch.ones(128, 64))
    steps(whole, optimizer_of(whole), iter(drawn), 6)
    first = torch.nn.Parameter(torch.ones(128, 64))
    optimizer = optimizer_of(first)
    steps(first, optimizer, iter(drawn), 3)
    save_state(tmp_path, optimizer.state_dict())
    second = torch.nn.Parameter(first.detach().clone())
    resumed = optimizer_of(second)
    resumed.load_state_dict(load_state(tmp_path))
    if not paged:  # bitsandbytes alone
        with pytest.raises(AttributeError, match="is_paged"):
            steps(second, resumed, iter(drawn[3:]), 1)
        return
    page_states(resumed)
    assert resumed.state[second]["state1"].dtype == torch.uint8
    steps(second, resumed, iter(drawn[3:]), 3)
    assert torch.equal(second, whole)
