"""Loss of plain text, against the loss that the stock language model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.inference import text_loss
from lora_llava.inference.text_loss import PLAIN_ENGLISH, measure_text_loss, read_plain_text
from tests.inference.small_runs import train_run

TEXT = read_plain_text(PLAIN_ENGLISH)


def stock_loss(model: Any, ids: list[int]) -> float:
    row = torch.tensor([ids])
    return float(model(input_ids=row, labels=row, use_cache=False).loss)


def test_the_loss_is_the_stock_models_with_and_without_the_adapter(speaking: Any) -> None:
    evaluator, _ = speaking
    found = measure_text_loss(evaluator.model, evaluator.tokenizer, TEXT[:300])
    ids = evaluator.tokenizer(TEXT[:300])["input_ids"]
    assert ids[0] == 1  # Llama's tokenizer writes <s> first
    assert found.tokens == len(ids) - 1
    with torch.inference_mode():
        assert found.loss == pytest.approx(stock_loss(evaluator.model, ids), abs=1e-5)
        with evaluator.model.disable_adapter():
            assert found.base_loss == pytest.approx(stock_loss(evaluator.model, ids), abs=1e-5)
    assert found.base_loss is not None
    assert abs(found.loss - found.base_loss) > 0.01


def test_a_long_text_is_read_in_windows_that_all_start_with_bos(speaking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, _ = speaking
    monkeypatch.setattr(text_loss, "WINDOW", 50)
    ids = evaluator.tokenizer(TEXT[:300], add_special_tokens=False)["input_ids"]
    windows = [[1, *ids[place : place + 50]] for place in range(0, len(ids), 50)]
    with torch.inference_mode():
        summed = sum(stock_loss(evaluator.model, window) * (len(window) - 1) for window in windows)
    found = measure_text_loss(evaluator.model, evaluator.tokenizer, TEXT[:300])
    assert found.tokens == len(ids)  # no token is lost where windows meet
    assert found.loss == pytest.approx(summed / len(ids), abs=1e-5)


def test_special_tokens_in_the_text_are_plain_text(speaking: Any) -> None:
    evaluator, _ = speaking
    plain, special = (
        measure_text_loss(evaluator.model, evaluator.tokenizer, f"one {word} two") for word in ("image", "<image></s>")
    )
    assert special.tokens > plain.tokens + 3  # <image> and </s> are several tokens each


def test_the_verb_prints_both_losses(
    parts: Path, scienceqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_run(tmp_path / "run", parts, scienceqa)
    (tmp_path / "grüße.txt").write_bytes("Grüße aus Köln. ".encode("cp1252") * 3)
    capsys.readouterr()
    assert main(None, ["text-loss", run, "--text", str(tmp_path / "grüße.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == "grüße.txt"
    assert found["loss"] != found["base_loss"]
    assert main(None, ["text-loss", run]) == 0
    out = capsys.readouterr().out
    assert "plain_english.txt" in out
    assert "without the adapter" in out


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "is not a file"), (b" \n", "is empty"), (b"\xff\xfeA\x00\x00\xd8", "save it as UTF-8")],
)
def test_a_file_that_is_not_a_text_is_refused(tmp_path: Path, content: bytes | None, problem: str) -> None:
    file = tmp_path / "page.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=problem):
        read_plain_text(file)
