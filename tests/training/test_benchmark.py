"""The benchmark: its rows have ScienceQA's lengths, and all sides train the same tokens."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from lora_llava.benchmark import benchmark_rows
from lora_llava.benchmark.benchmark_rows import DrawnImages, draw_rows, lay_out, shape_config
from lora_llava.benchmark.benchmark_sides import SIDES, BenchmarkSettings, run_side
from lora_llava.benchmark.comparison_run import benchmark
from lora_llava.core.errors import UserError
from lora_llava.data.selection import build_rows
from lora_llava.data.templates.named_templates import get_template
from lora_llava.model.families.tower_families import tokens_of_image
from lora_llava.model.tokenizer import load_tokenizer
from lora_llava.model.weights.parts import DEMO_FOLDER
from lora_llava.planning.row_order import batch_samples


def encoded(count: int, words: int | None = None) -> list[dict[str, Any]]:
    tokenizer, template = load_tokenizer(DEMO_FOLDER / "llm"), get_template("vicuna_v1", "")
    rows = draw_rows(count, words=words)
    return build_rows(rows, tokenizer=tokenizer, template=template, num_image_tokens=576, max_length=4096)[0]


def test_lengths_equal_scienceqa_s() -> None:
    """Check mean 615, 95th percentile 1,084, 35% trained, and a factor of 1.67 from padding in batches of 8."""
    rows = encoded(2000)
    lengths = sorted(len(row["input_ids"]) for row in rows)
    total = sum(lengths)
    assert total / len(rows) == pytest.approx(615, rel=0.04)
    assert lengths[1900] == pytest.approx(1084, rel=0.04)
    assert sum(label != -100 for row in rows for label in row["labels"]) / total == pytest.approx(0.35, abs=0.03)
    sizes = [len(row["input_ids"]) for row in rows]
    padded = sum(len(batch) * max(sizes[i] for i in batch) for batch in batch_samples(sizes, 8))
    assert padded / total == pytest.approx(1.67, abs=0.05)


def test_rows_of_768_tokens_are_that_long() -> None:
    from tests.benchmarks.gpu import WORDS_OF_768

    assert all(abs(len(row["input_ids"]) - 768) <= 1 for row in encoded(5, WORDS_OF_768))


def test_few_batches_represent_all_and_are_the_same_for_every_side() -> None:
    lengths = [len(row["input_ids"]) for row in encoded(1600)]
    grouped, shuffled = lay_out(lengths, 8, steps=8)
    assert grouped[0] == shuffled[0]
    assert sorted(i for batch in grouped for i in batch) == sorted(i for batch in shuffled for i in batch)
    assert [len(batch) for batch in grouped + shuffled] == [8] * 18
    tokens = [[lengths[i] for i in batch] for batch in grouped[1:]]
    mean = sum(map(sum, tokens)) / 64
    assert mean == pytest.approx(sum(lengths) / 1600, rel=0.03)
    assert sum(8 * max(batch) for batch in tokens) / sum(map(sum, tokens)) < 1.06
    mixed = [[lengths[i] for i in batch] for batch in shuffled[1:]]
    assert 1.4 < sum(8 * max(batch) for batch in mixed) / sum(map(sum, mixed)) < 2


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny_body", "tiny_tiles"])
def test_all_sides_train_the_same_tokens(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    monkeypatch.setitem(benchmark_rows.SHAPES, shape, (64, 128, 2, 2))
    found = [run_side(BenchmarkSettings(side, shape, 2, 2, 3, 4, "adamw_torch", None, pool=4)) for side in SIDES]
    assert [row["name"] for row in found] == list(SIDES)
    tokens = found[0]["real_tokens"]
    assert tokens > 6 * 50
    for row in found:
        assert row["real_tokens"] == tokens
        assert len(row["losses"]) == 4
        weights = 0.3 if row["name"] == "ours_cached" else 1e-4  # without a tower other random weights are drawn
        assert row["losses"][0] == pytest.approx(found[0]["losses"][0], abs=weights)
        assert row["real_tokens_per_second"] > 0
    assert found[2]["losses"] == pytest.approx(found[0]["losses"], abs=2e-3)  # their adapters differ at random
    assert found[0]["checkpointed_layers"] == 0
    assert found[2]["checkpointed_layers"] == 2


def test_images_of_mixed_sizes_have_the_tokens_of_their_tiles() -> None:
    drawn, config = DrawnImages(mixed=True), shape_config("tiny_tiles", 1000, 999)
    names = [str(number) for number in range(20)]
    assert [drawn.open(name).size[::-1] for name in names] == list(drawn.sizes(names).values())
    counts = [tokens_of_image(config, size) for size in drawn.sizes(names[:16]).values()]
    assert (min(counts), sum(counts) / 16, max(counts)) == (1176, 2032.875, 2352)


@pytest.mark.slow
def test_the_verb_writes_machine_versions_and_results(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    benchmark(
        shape="tiny_body",
        batch_size=1,
        steps=1,
        repeats=1,
        r=2,
        cap_gb=None,
        sides=["ours"],
        output=file,
        console=Console(file=io.StringIO(), width=160),
    )
    result = json.loads(file.read_text())
    assert set(result) == {"machine", "versions", "settings", "results"}
    assert result["versions"]["torch"] == torch.__version__
    (row,) = result["results"]
    assert row["name"] == "ours"
    assert row["real_tokens"] / row["seconds"] == pytest.approx(row["real_tokens_per_second"])


def test_settings_that_need_a_gpu_are_rejected_without_one() -> None:
    options: dict[str, Any] = {
        "batch_size": 1,
        "steps": 1,
        "repeats": 1,
        "r": 2,
        "sides": ["ours"],
        "output": None,
        "console": Console(),
    }
    with pytest.raises(UserError, match="--shape 7b would take days without a GPU; use tiny, tiny_body or tiny_tiles"):
        benchmark(shape="7b", cap_gb=None, **options)
    with pytest.raises(UserError, match="--cap-gb 8 has no effect, because this machine has no GPU; leave it out"):
        benchmark(shape="tiny", cap_gb=8.0, **options)


def test_the_demo_s_words_are_one_token_each() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER / "llm")
    assert all(len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1 for word in benchmark_rows._WORDS)
