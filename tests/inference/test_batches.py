"""Batches are cut to the free memory, and halved where a pass runs out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from lora_llava.benchmark.benchmark_rows import shape_config
from lora_llava.core.errors import UserError
from lora_llava.evaluation.answerers import by_generation, by_likelihood, by_reasoned_likelihood, reference_losses
from lora_llava.evaluation.inspection.row_measures import measure_rows
from lora_llava.inference.batches import Batches, question_bytes
from lora_llava.inference.sampling import Sampling
from lora_llava.model.weights.streaming import build_empty
from lora_llava.publishing.proof import Prompts, greedy_answers, last_logits

CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")
TEXTS = ("red", "It is blue, I think.", "The answer is A.")


@pytest.fixture
def device(speaking: Any) -> Any:
    """Let the language model run out of memory in batches of more rows than `most`; list the rows of its passes."""
    rows: list[int] = []
    state = SimpleNamespace(most=100, rows=rows, error=FULL)

    def allocate(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        size = len(kwargs["inputs_embeds"])
        rows.append(size)
        if size > state.most:
            raise state.error

    model = speaking[0].model.get_base_model().model.language_model
    handle = model.register_forward_pre_hook(allocate, with_kwargs=True)
    yield state
    handle.remove()


def generated(asked: Any, rows: Any) -> Any:
    return dict(by_generation(asked, Sampling(max_new_tokens=3))(rows, frozenset()))


def weighed(asked: Any, rows: Any) -> Any:
    return {i: found.text for i, found in by_likelihood(asked, lambda row, _: TEXTS)(rows, frozenset())}


def reasoned(asked: Any, rows: Any) -> Any:
    answerer = by_reasoned_likelihood(asked, Sampling(max_new_tokens=3), lambda row, _: TEXTS)
    return {i: found.text for i, found in answerer(rows, frozenset())}


def losses(asked: Any, rows: Any) -> Any:
    return {i: (round(loss, 3), tokens) for i, (loss, tokens) in reference_losses(asked, rows).items()}


def measured(asked: Any, rows: Any) -> Any:
    return [round(float(value), 3) for value in measure_rows(asked, rows, 0).own]


@pytest.mark.parametrize("ask", [generated, weighed, reasoned, losses, measured])
@pytest.mark.parametrize("error", [FULL, RuntimeError(CUBLAS)], ids=["torch", "cublas"])
def test_batches_are_halved_until_they_fit(
    speaking: Any, device: Any, capsys: Any, ask: Callable[[Any, Any], Any], error: Exception
) -> None:
    asked, rows = speaking
    expected = ask(replace(asked, batch_size=1), rows)
    device.rows.clear()
    device.most, device.error = 3, error
    assert ask(replace(asked, batch_size=8), rows) == expected
    assert device.rows[:2] == [8, 4]
    assert max(size for size in device.rows if size < 4) == 2
    printed = capsys.readouterr().err
    what = "rows" if ask is measured else "questions"
    assert f"memory ran out with 8 {what} at once: 4 at once from now on" in printed
    assert f"memory ran out with 4 {what} at once: 2 at once from now on" in printed


def test_the_merge_proof_is_halved_too(speaking: Any, device: Any, capsys: Any) -> None:
    asked, rows = speaking
    prompts = Prompts([asked.prompt(row) for row in rows if not row.images][:4], [None] * 4, 0, [None] * 4)
    stops = [asked.tokenizer.eos_token_id]
    answers = greedy_answers(asked.model, prompts, 3, stops)
    logits = last_logits(asked.model, prompts, answers, 4)
    assert device.rows[0] == 4
    device.most = 3
    assert greedy_answers(asked.model, prompts, 3, stops) == answers
    halved = last_logits(asked.model, prompts, answers, 4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(logits, halved, strict=True))
    assert len(halved) == 4
    assert capsys.readouterr().err.count("memory ran out with 4 prompts at once: 2 at once from now on") == 2


def test_one_question_that_does_not_fit_is_one_line(speaking: Any, device: Any) -> None:
    asked, rows = speaking
    device.most = 0
    with pytest.raises(UserError) as caught:
        generated(asked, rows)
    assert str(caught.value) == (
        "memory is full with 1 of the questions at once (CUDA out of memory); stop other programs that use it, or "
        "lower evaluation.max_new_tokens or data.max_length"
    )
    assert device.rows == [5, 2, 1]


def test_other_errors_pass(speaking: Any, device: Any) -> None:
    asked, rows = speaking
    device.most, device.error = 0, RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        generated(asked, rows)


def test_batches_are_planned_from_free_memory(
    speaking: Any, device: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked, rows = speaking
    expected = generated(asked, rows)
    longest = max(len(asked.prompt(row)) for row in rows)
    each = question_bytes(asked.model, longest, new_tokens=3)
    free = int(2.5 * each)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    device.rows.clear()
    assert generated(asked, rows) == expected
    assert device.rows[0] == 2
    printed = capsys.readouterr().err
    assert printed.count("at once would need") == 1
    assert f"5 questions at once would need {5 * each / 2**30:.1f} GiB" in printed


def test_a_token_of_a_7b_model_keeps_512_kib() -> None:
    model = build_empty(shape_config("7b", 0, 32000), torch.device("meta")).to(torch.bfloat16)
    kept, copied = 2 * 32 * 4096 * 2 * 2048, 4096 * 2 * 2048
    assert kept == 2**30
    token, head = 2 * (5 * 4096 + 3 * 11008), 32064 * 10
    assert question_bytes(model, 1024, new_tokens=1024) == kept + copied + token + head
    prefill = 1024 * token + 1024 * 1024 * 3 + head
    assert question_bytes(model, 1024, new_tokens=0) == kept // 2 + prefill
    assert question_bytes(model, 1024, cached=False) == prefill


def test_items_of_a_failed_batch_are_done_once_in_order() -> None:
    done: list[int] = []

    def work(chosen: list[int]) -> int:
        if sum(chosen) > 9:
            raise MemoryError
        done.extend(chosen)
        return sum(chosen)

    found = list(Batches(4).run([7, 6, 5, 4, 3, 2, 1], work))
    assert found == [([7], 7), ([6], 6), ([5], 5), ([4], 4), ([3], 3), ([2], 2), ([1], 1)]
    assert done == [7, 6, 5, 4, 3, 2, 1]
