"""`lora-llava evaluate`: files, resumption after a kill, servers, bad images, and the report."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from inference.chat_server import ChatLog
from PIL import Image
from rich.console import Console

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.data.templates.named_templates import chat_template, get_template
from lora_llava.evaluation.answer_log import AnswerLog
from lora_llava.evaluation.evaluate import EvaluationOptions, evaluate
from lora_llava.evaluation.run_report import rebuild_report
from lora_llava.evaluation.scienceqa import COLUMNS
from lora_llava.inference.answer import Answer
from lora_llava.recipe.io import check_recipe
from lora_llava.training.finetune import finetune
from tests.forked import kill, start_process, wait_for
from tests.inference.chat_server import chat_server
from tests.own_rows import asked, drawn, written


@pytest.fixture(scope="module")
def trained(parts: Path, scienceqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run over data of its own, which a test may spoil."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(scienceqa, folder / "data")
    content: dict[str, Any] = {
        "stage": 2,
        "output_dir": str(folder / "run"),
        "model": {
            "llm": str(parts / "llm"),
            "vision_tower": str(parts / "vision_tower"),
            "start_from": {"untrained": True},
        },
        "lora": {"r": 4, "alpha": 32},
        "data": {"format": "scienceqa", "path": str(folder / "data"), "max_length": 400, "system_prompt": ""},
        "training": {"batch_size": 8, "learning_rate": 2e-2, "max_steps": 6, "log_every": 1},
        "evaluation": {"max_new_tokens": 8, "batch_size": 2, "before": 0},
    }
    finetune(check_recipe(content, "test"), Path(), console=Console(file=io.StringIO(), width=160))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The run, its data and its recipe at a place of its own."""
    folder = tmp_path / "own"
    shutil.copytree(trained, folder)
    recipe = folder / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(trained), str(folder)))
    return folder / "run"


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_summary_records_the_settings(run: Path) -> None:
    table = evaluate(str(run))
    assert table == json.loads((run / "metrics.json").read_text())["after"]
    assert (run / "predictions.jsonl").read_text() == (run / "predictions_after.jsonl").read_text()
    found = json.loads((run / "evaluation.json").read_text())
    assert list(found["table"]) == list(COLUMNS)
    percent, correct, count = table["AVG"]
    assert found["table"]["AVG"] | {"interval": 0} == {
        "percent": percent,
        "correct": correct,
        "count": count,
        "interval": 0,
    }
    low, high = found["table"]["AVG"]["interval"]
    assert low < percent < high or percent in (0.0, 100.0)
    assert found["unparsed"] == {"count": table["unparsed"], "percent": round(100 * table["unparsed"] / 6, 2)}
    assert found["unopened_images"] == []
    asked = found["asked"]
    assert asked["prompt"]["name"] == "recipe"
    assert asked["prompt"]["order"] == "QCM-LEA"
    assert "parse_answer" in asked["parser"]
    assert asked["sampling"] == {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8, "seed": 0}
    assert set(asked["weights"]) == {"adapter", "base"}
    assert found["took"]["questions"] == 6
    assert {"machine", "versions"} <= set(found)


def test_different_options_write_different_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = {
        "": [],
        "_direct": ["--direct"],
        "_lmms_eval": ["--prompt", "lmms-eval"],
        "_loglik": ["--method", "loglik"],
        "_shuffled_direct_loglik": ["--direct", "--method", "loglik", "--shuffle-images"],
        "_base": ["--base-only"],
        "_sampled": ["--temperature", "0.7", "--top-p", "0.9"],
    }
    for suffix, arguments in calls.items():
        assert main("evaluate", [str(run), *arguments, "--json"]) == 0
        table = json.loads(capsys.readouterr().out)
        scored = lines(run / f"predictions{suffix}.jsonl")
        assert [line["question_id"] for line in scored] == ["31", "32", "33", "34", "35", "36"]
        assert table["AVG"][1] == sum(line["prediction"] == line["answer"] for line in scored)
        assert (run / f"evaluation{suffix}.json").is_file()
    for line in lines(run / "predictions_loglik.jsonl"):
        assert line["prediction"] == line["scores"].index(max(line["scores"]))
        assert line["text"].endswith(f"The answer is {'ABC'[line['prediction']]}.")
    assert {line["text"] for line in lines(run / "predictions_shuffled_direct_loglik.jsonl")} <= set("ABC")
    assert not list(run.glob("*.partial.*"))


def test_the_chosen_parser_is_used_and_named(run: Path, log: ChatLog, capsys: pytest.CaptureFixture[str]) -> None:
    log.answer = lambda body: "**a**"
    served = [str(run), "--server", log.url, "--json"]
    tables = {}
    for suffix, arguments in (
        ("_server", []),
        ("_lenient_server", ["--parser", "lenient"]),
        ("_server_x", ["evaluation.parser=lenient"]),
    ):
        assert main("evaluate", [*served, *arguments]) == 0
        tables[suffix] = json.loads(capsys.readouterr().out)
    assert tables["_server"]["unparsed"] == 6
    assert "parser" not in tables["_server"]
    assert (tables["_lenient_server"]["unparsed"], tables["_lenient_server"]["parser"]) == (0, "lenient")
    assert tables["_server_x"] == tables["_lenient_server"]
    assert "parse_leniently" in json.loads((run / "evaluation_lenient_server.json").read_text())["asked"]["parser"]
    scored = lines(run / "predictions_lenient_server.jsonl")
    assert [(line["prediction"], line["parser"]) for line in scored] == [(0, "lenient")] * 6
    loglik = ["--method", "loglik", "evaluation.parser=lenient", "--json"]
    assert main("evaluate", [str(run), *loglik]) == 0
    assert "parser" not in json.loads(capsys.readouterr().out)


def stored(folder: Path) -> int:
    """Count the answers in the store of a folder that another process has open; 0 if it is not there yet."""
    try:
        (file,) = folder.glob("*.partial.sqlite")
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as base:
            (count,) = base.execute("SELECT COUNT(*) FROM answers").fetchone()
    except (ValueError, sqlite3.OperationalError):
        return 0
    return int(count)


def evaluate_slowly(arguments: list[str]) -> None:
    add = AnswerLog.add

    def slow(self: AnswerLog, index: int, answer: Answer) -> None:
        add(self, index, answer)
        time.sleep(0.5)

    AnswerLog.add = slow  # type: ignore[method-assign]
    main(None, arguments)


def test_a_killed_evaluation_resumes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run / "whole"
    evaluate(str(run), output=str(whole), overrides=["evaluation.batch_size=1"])
    arguments = ["evaluate", str(run), "evaluation.batch_size=1", "--output", str(run / "killed")]
    process = start_process(evaluate_slowly, arguments)
    wait_for(lambda: stored(run / "killed") >= 2)
    kill(process)
    kept = stored(run / "killed")
    assert 2 <= kept < 6
    assert main(None, arguments) == 0
    assert f"{kept} of 6 answers are in" in capsys.readouterr().err
    assert (run / "killed" / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()
    assert not list((run / "killed").glob("*.partial.*"))


def test_a_missing_image_counts_as_wrong_or_is_an_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = next((run.parent / "data" / "images" / "test").rglob("image.png"))
    name = image.parent.name
    before = lines(run / "predictions_after.jsonl")
    image.write_bytes(b"no image")
    assert main("evaluate", [str(run)]) == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert f"{name}/image.png cannot be read" in output
    assert main("evaluate", [str(run), "--bad-images", "wrong"]) == 0
    scored = lines(run / "predictions.jsonl")
    lost = next(line for line in scored if line["question_id"] == name)
    assert (lost["prediction"], lost["text"]) == (-1, "")
    assert "cannot be read" in lost["problem"]
    assert [line for line in scored if line != lost] == [line for line in before if line["question_id"] != name]
    assert json.loads((run / "evaluation.json").read_text())["unopened_images"] == [name]
    assert f"1 question counts as wrong because its image cannot be opened: {name}" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be read"):
        evaluate(str(run))


def test_options_that_do_not_fit_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--prompt", "dirct"], "--prompt: 'dirct' is unknown; use one of recipe, direct, lmms-eval"),
        (["--method", "loglik", "--temperature", "1"], "leave them out with --method loglik"),
        (["--server", "http://127.0.0.1:9", "--server-model", "m", "--base-only"], "need a local model"),
        (["--temperature", "-1"], "temperature is -1.0; set it to 0 (greedy)"),
        (["--benchmark", "llava-bench"], "--questions is missing"),
        (["--benchmark", "llava-bench", "--limit", "3"], "--limit has no effect with --benchmark llava-bench"),
        (["--benchmark", "llava-bench", "--base-only"], "--base-only has no effect with --benchmark"),
        (["--benchmark", "llava-bench", "foo.bar=3"], "an override of a recipe has no effect with"),
        (["--questions", "q.jsonl"], "--questions needs --benchmark llava-bench; add that"),
        (["--concurrency", "4"], "--concurrency needs --server; add it"),
        (["--timeout", "0"], "--timeout needs --server"),
        (["--server", "http://127.0.0.1:9", "--timeout", "inf"], "timeout is inf; give a number of seconds"),
        (["--prompt", "lmms-eval", "--direct"], "contradict each other; leave one out"),
        (["--parser", "lenient", "--method", "loglik"], "--parser lenient reads letters in generated answers"),
        (["--benchmark", "llava-bench", "--parser", "llava"], "--parser has no effect with --benchmark llava-bench"),
        (["--published", "--json"], "--published has no effect with --json"),
    ):
        assert main("evaluate", [str(run), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_base_only_needs_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = json.loads((run / "run.json").read_text())["base"]["name"]
    arguments = [str(base), "--recipe", str(run / "recipe.yaml"), "--base-only"]
    assert main("evaluate", arguments) == 2
    assert "--base-only: " in capsys.readouterr().err


def test_a_limited_evaluation_keeps_the_full_predictions(run: Path) -> None:
    evaluate(str(run), output=str(run / "own"))
    whole = (run / "own" / "predictions.jsonl").read_bytes()
    assert evaluate(f"{run}/", limit=2, output=str(run / "own"))["AVG"][2] == 2
    assert (run / "own" / "predictions.jsonl").read_bytes() == whole
    assert len(lines(run / "own" / "predictions_limit2.jsonl")) == 2
    asked = json.loads((run / "own" / "evaluation_limit2.json").read_text())["asked"]
    assert (asked["split"], asked["limit"], asked["data"]["prompt_order"]) == ("test", 2, "QCM-LEA")
    assert len(asked["questions"]) == 64


def test_rows_dropped_by_the_run_are_not_a_change_of_data(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    """A held-out image is broken, and the recipe drops such rows: later evaluations go by the same rows."""
    drawn(tmp_path / "images", 12)
    (tmp_path / "images" / "3.png").write_bytes(b"no image")
    rows = [asked(number, f"{number}.png") for number in range(12)]
    stage2_content["data"] = {
        "format": "conversations",
        "path": written(tmp_path / "rows.json", rows),
        "on_bad_image": "drop",
        "image_folder": str(tmp_path / "images"),
        "max_length": 300,
        "system_prompt": "",
        "validation_rows": 10,
    }
    stage2_content["training"] |= {"max_steps": 1, "batch_size": 1}
    metrics = finetune(check_recipe(stage2_content, "test"), Path(), console=Console(file=io.StringIO()))
    run = stage2_content["output_dir"]
    assert evaluate(run, EvaluationOptions(bad_images="wrong")) == metrics["after"]
    assert evaluate(run) == metrics["after"]
    rebuild_report(run)


# --- servers -------------------------------------------------------------------------------------------------------


def letter_for(body: dict[str, Any]) -> str:
    """Answers A where an image is shown, B elsewhere."""
    content = body["messages"][-1]["content"]
    return "The answer is A." if isinstance(content, list) else " The answer is B. "


def test_a_server_receives_the_questions_with_their_images(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server() as log:
        log.models, log.answer = ["merged"], letter_for
        assert main("evaluate", [str(run), "--server", log.url, "--json", "--output", str(run / "served")]) == 0
        table = json.loads(capsys.readouterr().out)
    scored = lines(run / "served" / "predictions_server.jsonl")
    assert [line["text"] for line in scored] == ["The answer is A.", "The answer is B."] * 3
    assert table["AVG"][2] == 6
    asked_for = [body for body in log.requests if body["max_tokens"] > 1]  # the others count the prompt's tokens
    assert len(asked_for) == 6
    body = next(body for body in asked_for if isinstance(body["messages"][0]["content"], list))
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["text"].startswith("Which colour is shown?\nContext: N/A\nOptions: (A) red")
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.0, 8, "merged")
    asked = json.loads((run / "served" / "evaluation_server.json").read_text())["asked"]
    assert (asked["server"], asked["served_model"]) == (log.url, "merged")


@pytest.mark.parametrize("fault", ["500", "cut", "stall", "html", "no choices"])
def test_failed_questions_of_a_server_are_named_and_the_others_kept(
    run: Path, fault: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_llava.inference.client.client.ChatServer.pause", 0.01)
    arguments = [str(run), "--server", "", "--timeout", "0.5", "--concurrency", "4", "--output", str(run / "served")]
    with chat_server() as log:
        log.models, log.answer = ["m"], letter_for
        log.behave = lambda body, count: fault if isinstance(body["messages"][-1]["content"], list) else "ok"
        arguments[2] = log.url
        assert main("evaluate", arguments) == 1
        output = capsys.readouterr().err
        assert "3 of 6 questions got no answer (3" in output
        assert not (run / "served" / "predictions_server.jsonl").exists()
        log.behave = lambda body, count: "ok"
        first = sum(body["max_tokens"] > 1 for body in log.requests)
        assert main("evaluate", arguments) == 0
        assert sum(body["max_tokens"] > 1 for body in log.requests) - first == 3


def test_an_empty_answer_is_an_answer(run: Path) -> None:
    with chat_server() as log:
        log.models, log.answer = ["m"], lambda body: ""
        from lora_llava.inference.client.client import ChatServer

        table = evaluate(str(run), output=str(run / "served"), server=ChatServer(log.url))
    assert table["unparsed"] == 6


def testserver_messages_render_to_the_training_prompt(run: Path) -> None:
    """The messages of the request, written by the exported processor, are the trained prompt's text."""
    from lora_llava.data.images.image_sources import FolderImages
    from lora_llava.evaluation.answerers import server_messages
    from lora_llava.evaluation.evaluate import open_evaluation

    opened = open_evaluation(str(run), EvaluationOptions())
    rows = opened.split.read(range(2))
    images = FolderImages(run.parent / "data" / "images", 10**6)
    for row in rows:
        messages = server_messages(row, images)
        for message in messages:
            if not isinstance(message["content"], str):
                message["content"] = [
                    {"type": "image"} if part["type"] == "image_url" else part for part in message["content"]
                ]
        template = chat_template(get_template("vicuna_v1", ""))
        text = opened.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        question = row.turns[0].text.replace("<image>", "<image> ")  # SentencePiece's dummy prefix after an image
        assert text == f"USER: {question} ASSISTANT:"
    assert any(row.images for row in rows)


# --- the run's page ------------------------------------------------------------------------------------------------


def test_a_report_can_be_rebuilt(run: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (run / "report.html").read_text()
    scored = lines(run / "predictions_after.jsonl")
    for line in scored:
        assert line["question_id"] in page
    right = sum(line["prediction"] == line["answer"] for line in scored)
    assert f"of {6 - right} wrong and of {right} right answers" in page
    assert page.count("<svg") >= 4  # loss, learning rate, speed, memory
    assert "http://" not in page.replace("http://www.w3.org/", "")
    (run / "report.html").unlink()
    assert main("report", [str(run)]) == 0
    moved = [(run / "report.html").read_text(), page.replace(str(trained), str(run.parent))]
    recipe_hash = re.compile(r"<dt>recipe</dt><dd>\w{12}</dd>")  # the recipe names the data's place
    assert len({recipe_hash.sub("", text, count=1) for text in moved}) == 1
    assert "report.html: open it" in capsys.readouterr().out


def test_the_report_uses_only_the_run_s_questions(run: Path) -> None:
    file = run / "predictions_after.jsonl"
    rows = lines(file)
    rows[0]["question_id"] = "99"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="answers questions that the run's data no longer has"):
        rebuild_report(str(run))
    with pytest.raises(UserError, match="is a folder of runs"):
        rebuild_report(str(run.parent))
    file.unlink()
    assert "question" in rebuild_report(str(run)).read_text()


def test_the_report_shows_the_image_of_each_question(run: Path) -> None:
    page = (run / "report.html").read_text()
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    colours = {Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").getpixel((5, 5)) for data in found}
    assert colours == {(220, 30, 30), (30, 60, 220), (30, 160, 60)}
