"""The parts of `benchmark.py gpu`: which there are, what a failure leaves, and that the time is kept."""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lora_llava.core.errors import UserError
from lora_llava.planning.memory import CUDA_CONTEXT, GIB
from tests.benchmarks import gpu, gpu_parts


def test_eight_plans_and_four_speeds_are_measured() -> None:
    names = [part.name for part in gpu.list_parts(False, 24 * GIB)]
    assert len(set(names)) == len(names) == 2 + 4 + 1 + 8
    speeds = [part.argument for part in gpu.list_parts(False, 24 * GIB) if part.name.startswith("speed")]
    assert [(each.side, each.liger) for each in speeds] == [
        ("ours", False),
        ("ours", True),
        ("trl_random", False),
        ("trl_random", True),
    ]
    plans = [part.argument for part in gpu.list_parts(False, 24 * GIB) if part.name.startswith("plan")]
    assert [each.cap_bytes for each in plans] == 4 * [8 * GIB - CUDA_CONTEXT] + 4 * [24 * GIB]
    assert {each.words for each in plans} == {gpu.WORDS_OF_768}
    on_a_small_card = [part.argument.cap_bytes for part in gpu.list_parts(False, 6 * GIB)[-8:]]
    assert on_a_small_card == 8 * [6 * GIB]


def test_without_a_gpu_one_line_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(UserError, match=r"no CUDA GPU is here to measure; --tiny tries the benchmark itself on a CPU"):
        gpu.run(argparse.Namespace(tiny=False, minutes=12.0, output=None))


def test_every_result_has_a_line() -> None:
    errors = {"kernel": "flash_attn", "output": 0.002, "query": 0.004, "key": 0.003, "value": 0.001}
    found = {
        "attention": {"relative_errors": [errors, errors | {"query": 0.005}, {"kernel": "other", "error": "none"}]},
        "rounding": {"packed": {"gradients": 0.01}, "padded": {"gradients": 0.02}, "liger_error": "none"},
        "speed ours": {"real_tokens_per_second": 2345.6, "micro_batch": 4},
        "speed trl": {"out_of_memory": "CUDA out of memory"},
        "plan a": {"planned_over_peak_memory_bytes": 1.021, "planned_over_peak_reserved_bytes": 0.99},
        "plan b": {"error": "RuntimeError: x\ny"},
        "plan c": {"skipped": "no time was left"},
        "answers": {"batched": 3.0, "one_at_a_time": 0.5, "new_tokens": 64, "batch_size": 8},
    }
    stream = io.StringIO()
    gpu.print_result(found, Console(file=stream, width=100))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert lines == [
        "attention   flash_attn 5.0e-03, other failed",
        "rounding    gradients: packed 1.00%, padded 2.00%",
        "speed ours  2,346 tokens/s, 4 a pass",
        "speed trl   out_of_memory: CUDA out of memory",
        "plan a      plan over peak 1.021, reserved 0.990",
        "plan b      error: RuntimeError: x",
        "plan c      skipped: no time was left",
        "answers     3.00 a second in batches of 8, 0.50 one at a time",
    ]


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_ctrl_c_keeps_what_was_measured(
    finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first part describes the machine; Ctrl-C comes in the one after those that finished."""
    done: list[str] = []

    def run_part(part: gpu.Part, limit: float) -> dict[str, Any]:
        if len(done) == finished:
            raise KeyboardInterrupt
        done.append(part.name)
        return {"error": part.name}

    monkeypatch.setattr(gpu, "run_part", run_part)
    file = tmp_path / "found.json"
    assert gpu.run(argparse.Namespace(tiny=True, minutes=12.0, output=file)) == 130
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 1
    if finished < 2:
        assert output == "stopped; nothing was measured\n"
        assert not file.exists()
    else:
        assert output == f"stopped; 2 of 9 parts are measured, in {file}\n"
        assert list(json.loads(file.read_text())["parts"]) == ["attention", "rounding"]


def full(settings: Any) -> dict[str, Any]:
    return {"micro_batch": settings.micro_batch} | ({"out_of_memory": "full"} if settings.micro_batch > 1 else {})


def broken(_: bool) -> dict[str, Any]:
    raise ValueError("no such thing")


def killed(_: bool) -> dict[str, Any]:
    os._exit(9)


@pytest.mark.more
def test_a_part_that_fails_leaves_its_reason() -> None:
    """Each part in a new process: one raises, one dies, one is full at two samples, and one has no time."""
    end = time.monotonic() + 900
    found = gpu.run_within(gpu.Part("broken", broken, True), end)
    assert found["error"] == "ValueError: no such thing"
    assert "in broken" in found["traceback"]
    assert gpu.run_within(gpu.Part("killed", killed, True), end)["error"] == "its process ended with 9"
    settings = replace(gpu.list_parts(True, None)[2].argument, micro_batch=2)
    assert gpu.run_within(gpu.Part("full", full, settings), end)["micro_batch"] == 1
    assert gpu.run_within(gpu.Part("broken", broken, True), time.monotonic()) == {"skipped": "no time was left"}


def test_attention_is_measured_on_a_cpu() -> None:
    errors = gpu_parts.attention_errors(True)["relative_errors"]
    assert [(each["key_heads"], each["window"]) for each in errors] == [(8, None), (8, 64), (2, None), (2, 64)]
    assert all(1e-4 < each[name] < 1e-2 for each in errors for name in ("output", "query", "key", "value"))


@pytest.mark.more
def test_rounding_is_measured_on_a_cpu() -> None:
    noise = gpu_parts.rounding_noise(True)
    for kind in ("packed", "padded"):
        assert 1e-4 < noise[kind]["gradients"] < 0.1
        assert noise[kind]["loss"] < 0.01
    assert noise["padded_and_packed"]["gradients"] < 0.1
