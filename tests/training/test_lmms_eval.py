"""lmms-eval asks a run, its base and its merged folder: the answers of `evaluate`, and those of its own `llava_hf`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image
from rich.console import Console

from lora_llava.commands.main import main
from lora_llava.evaluation.lmms.task_questions import TaskAsker, TaskQuestion
from lora_llava.inference.open_model import open_speaker
from lora_llava.publishing.merge import merge
from tests.inference.small_runs import train_run

pytestmark = [
    pytest.mark.more,
    pytest.mark.skipif(
        find_spec("lmms_eval") is None or find_spec("filelock._api") is None,
        reason="lmms-eval is not installed: pip install 'lora_llava[bench]'",
    ),
]
COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 160, 60)}
CHOICES = ["red", "dark blue", "green"]
TASK = """
task: {name}
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: {kind}
doc_to_visual: !function shapes.visual
doc_to_text: "question"
doc_to_target: "answer"
"""
GENERATED = """
process_results: !function shapes.results
generation_kwargs: {max_new_tokens: 8, temperature: 0, do_sample: false, until: ["never"]}
metric_list: [{metric: as_evaluated, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
doc_to_choice: "choices"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
FUNCTIONS = """
def visual(doc):
    return [doc["image"].convert("RGB")] if doc.get("image") is not None else []


def results(doc, results):
    return {"as_evaluated": float(results[0] == doc["answer"])}
"""


@pytest.fixture(scope="module")
def run(parts: Path, scienceqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(train_run(tmp_path_factory.mktemp("lmms") / "run", parts, scienceqa))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of six questions, the last two without an image."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number in range(6):
        row = {"id": str(number), "question": f"Which colour has shape {number}?", "answer": "red"}
        if number < 4:
            row["image"] = f"{number}.png"
            Image.new("RGB", (40, 24 + number), list(COLOURS.values())[number % 3]).save(folder / row["image"])
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def opened(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.copy()


def answers_of(model: Path, rows: Path, output: Path) -> list[str]:
    """Return the answers of `lora-llava evaluate`."""
    asked = [str(model), "--data", str(rows), "evaluation={max_new_tokens: 8}", "--output", str(output)]
    assert main("evaluate", asked) == 0
    [file] = output.glob("predictions*.jsonl")
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def write_tasks(folder: Path, rows: Path, answers: list[str], chosen: list[int]) -> None:
    """Write the questions as three tasks: `shapes` with images, `words` without, `choices` with both."""
    docs: list[dict[str, Any]] = []
    for line, answer in zip(rows.read_text().splitlines(), answers, strict=True):
        row = json.loads(line)
        image = opened(rows.parent / row["image"]) if "image" in row else None
        docs.append({"question": row["question"], "answer": answer, "image": image})
    choosing = [{**doc, "answer": place, "choices": CHOICES} for doc, place in zip(docs[:4], chosen, strict=True)]
    for doc in docs[4:]:
        doc.pop("image")
    tasks = {"shapes": (docs[:4], GENERATED), "words": (docs[4:], GENERATED), "choices": (choosing, CHOSEN)}
    folder.mkdir()
    (folder / "shapes.py").write_text(FUNCTIONS)
    for name, (own, rest) in tasks.items():
        DatasetDict({"test": Dataset.from_list(own)}).save_to_disk(folder / "data" / name)
        kind = "multiple_choice" if rest is CHOSEN else "generate_until"
        text = TASK.format(name=name, data=folder / "data" / name, kind=kind) + rest
        (folder / f"{name}.yaml").write_text(text)


def in_a_process(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a module of Python in a process of its own: lmms-eval changes libraries for the whole process."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_scores_and_answers_of_a_run_its_base_and_its_merged_folder(run: Path, rows: Path, tmp_path: Path) -> None:
    answers = answers_of(run, rows, tmp_path / "ours")
    tasks = tmp_path / "tasks"
    images = [opened(rows.parent / f"{number}.png") for number in range(4)]
    questions = [
        TaskQuestion(str(number), f"Which colour has shape {number}?", lambda image=image: [image], choice)
        for number, image in enumerate(images)
        for choice in CHOICES
    ]
    found = [loss for loss, _ in TaskAsker(open_speaker(str(run)), None, tmp_path, {}).losses("c", questions)]
    likeliest = [min(range(3), key=found[start : start + 3].__getitem__) for start in range(0, 12, 3)]
    wrong = [(likeliest[0] + 1) % 3, *likeliest[1:]]
    write_tasks(tasks, rows, [*answers[:3], "another", *answers[4:]], wrong)
    named = ",".join(str(tasks / f"{name}.yaml") for name in ("shapes", "words", "choices"))
    ask = ["lora_llava.commands.main", "evaluate", str(run), "--benchmark", f"lmms:{named}"]
    in_a_process(*ask)
    *_, shown = in_a_process(*ask, "--base-only", "--json").stdout.partition("{")
    texts = [
        json.loads(line)["text"]
        for name in ("shapes", "words")
        for line in (run / f"lmms_{name}.jsonl").read_text().splitlines()
    ]
    assert texts == answers
    saved = json.loads((run / "metrics.json").read_text())["benchmarks"]
    assert saved == json.loads("{" + shown)
    assert {name: each["after"] for name, each in saved.items()} == {
        "shapes": {"as_evaluated": 0.75},
        "words": {"as_evaluated": 1.0},
        "choices": {"acc": 0.75},
    }
    assert {name: each["questions"] for name, each in saved.items()} == {"shapes": 4, "words": 2, "choices": 4}
    assert all(set(each) == {"questions", "before", "after"} for each in saved.values())
    assert "Public benchmarks" in (run / "report.html").read_text()


def test_the_merged_folder_answers_as_through_llava_hf(run: Path, rows: Path, tmp_path: Path) -> None:
    merged, tasks = tmp_path / "merged", tmp_path / "tasks"
    merge(run, merged, dtype="float32", console=Console(file=io.StringIO()))
    write_tasks(tasks, rows, ["red"] * 6, [0] * 4)
    in_a_process("lora_llava.commands.main", "evaluate", str(merged), "--benchmark", f"lmms:{tasks / 'shapes.yaml'}")
    ours = [json.loads(line)["text"] for line in (merged / "lmms_shapes.jsonl").read_text().splitlines()]
    arguments = f"pretrained={merged},device=cpu,device_map=cpu"
    asked = ["--include_path", str(tasks), "--tasks", "shapes", "--batch_size", "1", "--log_samples"]
    in_a_process("lmms_eval", "--model", "llava_hf", "--model_args", arguments, *asked, "--output_path", str(tmp_path))
    [file] = tmp_path.rglob("*_samples_shapes.jsonl")
    stock = [json.loads(line)["filtered_resps"] for line in file.read_text().splitlines()]
    assert [each.strip() for each in stock] == ours


def test_mistakes_are_one_line(run: Path, tmp_path: Path, rows: Path) -> None:
    write_tasks(tmp_path / "tasks", rows, ["red"] * 6, [0] * 4)
    broken = tmp_path / "tasks" / "gone.yaml"
    broken.write_text(TASK.format(name="gone", data=tmp_path / "nowhere", kind="generate_until") + GENERATED)
    rounds = tmp_path / "tasks" / "rounds.yaml"
    data = tmp_path / "tasks" / "data" / "words"
    rounds.write_text(TASK.format(name="rounds", data=data, kind="generate_until_multi_round") + GENERATED)
    expected = {
        "popr": 'lmms-eval has no task popr (did you mean "pope"?)',
        "none.yaml": "none.yaml does not exist; name the YAML file of a task",
        str(broken): "gone: lmms-eval cannot load it (FileNotFoundError",
        str(rounds): "rounds: its kind of question, generate_until_multi_round, is not answered here; leave it out",
    }
    for name, message in expected.items():
        command = ["lora_llava.commands.main", "evaluate", str(run), "--benchmark", f"lmms:{name}"]
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr.splitlines()[-1]
