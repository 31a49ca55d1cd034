"""`lora-llava evaluate MODEL --benchmark llava-bench`: answers in the format of the judge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_llava.commands.main import main
from lora_llava.data.conversation import Conversation, Turn
from lora_llava.data.encode import encode_prompt
from lora_llava.data.images.image_sources import read_rgb
from lora_llava.evaluation.asked.spoken_answers import prompt_ids
from lora_llava.evaluation.judge.llava_bench_answers import answer_llava_bench
from lora_llava.inference.open_model import open_speaker
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import Speaker, stream_answer, user_message
from tests.evaluation.llava_bench_files import bench, options, write
from tests.inference.chat_server import ChatLog, chat_server
from tests.inference.small_runs import draw_image, train_run


@pytest.fixture(scope="module")
def run(parts: Path, scienceqa: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_run(tmp_path_factory.mktemp("bench") / "run", parts, scienceqa)


@pytest.fixture(scope="module")
def speaker(run: str) -> Speaker:
    return open_speaker(run)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Six questions about one image, and the options that take them."""
    draw_image(tmp_path / "images" / "1.jpg")
    return bench(tmp_path, 6)


@pytest.fixture
def log() -> Iterator[ChatLog]:
    with chat_server() as log:
        yield log


def rows_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_prompts_are_those_of_training(speaker: Speaker) -> None:
    row = Conversation("1", (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "?")), ("1.jpg",), {})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\nWhat is it?"}]
    tokens = speaker.model.get_base_model().config.image_seq_length
    assert prompt_ids(speaker, row, {}) == encode_prompt(
        messages, tokenizer=speaker.processor.tokenizer, template="vicuna_v1", num_image_tokens=tokens
    )


def test_answers_equal_those_of_a_chat(run: str, speaker: Speaker, files: dict[str, Path], tmp_path: Path) -> None:
    images = tmp_path / "images"
    sampling = Sampling(max_new_tokens=12)
    file = answer_llava_bench(run, files["questions"], images, output=tmp_path, sampling=sampling, batch_size=4)
    rows = rows_of(file)
    assert [row["question_id"] for row in rows] == [str(number) for number in range(6)]
    assert [row["category"] for row in rows] == ["conv", "detail", "complex"] * 2
    for row in rows[:3]:
        message = user_message(f"What is in {row['question_id']}?", [read_rgb(images / "1.jpg", "1.jpg", 10_000)])
        assert row["text"] == "".join(stream_answer(speaker, [message], sampling)).strip()
    about = json.loads(file.with_suffix(".json").read_text())
    assert about["questions"] == 6
    assert about["unopened_images"] == []


def test_a_server_answers_and_a_judge_scores(
    files: dict[str, Path], tmp_path: Path, log: ChatLog, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both commands as a person gives them, the second reading what the first wrote."""
    log.models, log.answer = ["llava"], lambda body: "A dog."
    images = ["--images", str(tmp_path / "images"), "--questions", str(files["questions"])]
    asked = ["llava", "--benchmark", "llava-bench", "--server", log.url, "--output", str(tmp_path / "served"), *images]
    assert main("evaluate", asked) == 0
    file = tmp_path / "served" / "llava_bench_answers.jsonl"
    assert {row["text"] for row in rows_of(file)} == {"A dog."}
    assert log.requests[0]["messages"][-1]["content"][0]["type"] == "image_url"
    # The judge gives 9 to what stands first and 7 to the other: swapped, that is even.
    log.answer = lambda body: "9 7\nThe first is better."
    judged = [*options(files | {"answers": file}), "--judge-url", log.url]
    assert main("score", ["llava-bench", *judged]) == 0
    report = json.loads((tmp_path / "served" / "llava_bench.json").read_text())
    assert {name: row["relative"] for name, row in report["table"].items()} == dict.fromkeys(report["table"], 100.0)
    assert "A dog." not in capsys.readouterr().out


def test_missing_images_and_arguments(
    run: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = rows_of(files["questions"])
    write(files["questions"], [questions[0], questions[1] | {"image": "gone.jpg"}])
    asked = [run, "--benchmark", "llava-bench", "--questions", str(files["questions"]), "--output", str(tmp_path)]
    expected = {
        "--images is missing": asked,
        "is not a folder": [*asked, "--images", str(tmp_path / "none")],
        "gone.jpg": [*asked, "--images", str(tmp_path / "images")],
    }
    for message, arguments in expected.items():
        assert main("evaluate", arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error
    assert main("evaluate", [*asked, "--images", str(tmp_path / "images"), "--bad-images", "wrong"]) == 0
    rows = rows_of(tmp_path / "llava_bench_answers.jsonl")
    assert rows[0]["text"] != ""
    assert rows[1]["text"] == ""
    assert json.loads((tmp_path / "llava_bench_answers.json").read_text())["unopened_images"] == ["1"]
