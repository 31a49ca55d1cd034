"""Questions of lmms-eval's tasks: answers equal those of a chat, losses those of a plain pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_llava.core.errors import UserError
from lora_llava.evaluation.lmms.task_questions import TaskAsker, TaskQuestion, TaskSettings
from lora_llava.inference.client.client import ChatServer
from lora_llava.inference.open_model import open_speaker
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import Speaker, encode_messages, stream_answer, user_message
from tests.inference.chat_server import ChatLog, chat_server
from tests.inference.small_runs import train_run

SETTINGS = TaskSettings(Sampling(max_new_tokens=12))
RED, BLUE = Image.new("RGB", (40, 24), (220, 30, 30)), Image.new("RGB", (30, 30), (30, 60, 220))


@pytest.fixture(scope="module")
def speaker(parts: Path, scienceqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    return open_speaker(train_run(tmp_path_factory.mktemp("tasks") / "run", parts, scienceqa))


@pytest.fixture
def asker(speaker: Speaker, tmp_path: Path) -> TaskAsker:
    return TaskAsker(speaker, None, tmp_path, {"weights": "1"}, batch_size=2)


@pytest.fixture
def log() -> Iterator[ChatLog]:
    with chat_server() as log:
        yield log


def question(text: str, *images: Any, name: str = "0", answer: str = "") -> TaskQuestion:
    return TaskQuestion(name, text, lambda: images, answer)


def chat(speaker: Speaker, text: str, *images: Image.Image) -> str:
    return "".join(stream_answer(speaker, [user_message(text, images)], SETTINGS.sampling)).strip()


def test_answers_equal_those_of_a_chat(asker: TaskAsker, speaker: Speaker, tmp_path: Path) -> None:
    asked = [("What is it?", RED), ("What is it?",), ("Which differs?", RED, BLUE), ("Is <image> a word?", BLUE, RED)]
    questions = [question(text, *images, name=str(place)) for place, (text, *images) in enumerate(asked)]
    found = asker.generate("shapes", questions, SETTINGS)
    assert found == [chat(speaker, text, *images) for text, *images in asked]
    lines = [json.loads(line) for line in (tmp_path / "lmms_shapes.jsonl").read_text().splitlines()]
    assert lines == [{"question_id": str(place), "text": text} for place, text in enumerate(found)]


def test_images_stay_where_the_text_places_them(asker: TaskAsker, log: ChatLog, tmp_path: Path) -> None:
    log.models = ["llava"]
    asker = TaskAsker(None, ChatServer(log.url, "llava"), tmp_path, {})
    asker.generate("places", [question("Is <image> or <image> red?", RED, BLUE)], SETTINGS)
    [request] = log.requests
    parts = request["messages"][0]["content"]
    assert [part.get("text") for part in parts] == ["Is ", None, " or ", None, " red?"]
    assert request["max_tokens"] == 12


def test_an_answer_ends_at_the_tasks_text(asker: TaskAsker, speaker: Speaker) -> None:
    whole = chat(speaker, "What is it?", RED)
    end = whole[len(whole) // 2 :]
    found = asker.generate("ends", [question("What is it?", RED)], TaskSettings(SETTINGS.sampling, (end,)))
    assert found == [whole[: whole.index(end)]]


def test_settings_without_effect_are_reported(asker: TaskAsker, capsys: pytest.CaptureFixture[str]) -> None:
    asker.generate("beams", [question("What is it?")], TaskSettings(Sampling(max_new_tokens=1), (), ("num_beams=3",)))
    assert "beams: num_beams=3 is not used here" in capsys.readouterr().err


def test_losses_equal_those_of_a_plain_pass(asker: TaskAsker, speaker: Speaker) -> None:
    given = [("What is it?", " A square.", RED), ("What is it?", "No", RED), ("Yes or no?", "No"), ("Why?", "A B C D")]
    questions = [question(text, *images, answer=answer) for text, answer, *images in given]
    expected = []
    for text, answer, *images in given:
        batch = encode_messages(speaker, [user_message(text, images)])
        ids = speaker.processor.tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*ids, speaker.processor.tokenizer.eos_token_id]])
        start = batch["input_ids"].shape[1]
        batch["input_ids"] = torch.cat([batch["input_ids"], ids], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        with torch.inference_mode():
            logits = speaker.model(**batch).logits[0, start - 1 : -1].float().log_softmax(-1)
        loss = -logits.gather(1, ids[0, :, None]).mean()
        expected.append((float(loss), bool((logits.argmax(-1) == ids[0]).all())))
    found = asker.losses("choices", questions)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_what_is_not_an_image_is_refused(asker: TaskAsker) -> None:
    with pytest.raises(UserError, match=r"films: question 7 comes with a str, not an image; choose tasks of images"):
        asker.generate("films", [question("What happens?", "film.mp4", name="7")], SETTINGS)


def test_a_prompt_without_room_for_an_answer_is_refused(asker: TaskAsker, speaker: Speaker) -> None:
    tokens = f"{len(encode_messages(speaker, [user_message('?', [RED])])['input_ids'][0]):,}"
    assert int(tokens) < 512
    with pytest.raises(
        UserError, match=r"many: question 3 with 200 images has [\d,]+ tokens, and .* only 512 positions"
    ):
        asker.generate("many", [question("Which?", *[RED] * 200, name="3")], SETTINGS)


def test_a_server_has_no_losses_of_given_answers(tmp_path: Path, log: ChatLog) -> None:
    with pytest.raises(UserError, match=r"choices compares given answers by their loss.* leave --server out"):
        TaskAsker(None, ChatServer(log.url, "llava"), tmp_path, {}).losses("choices", [question("Why?", answer="No")])
