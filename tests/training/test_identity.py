"""A resumed run has the same base, tokenizer, images, rows and questions, checked by hash and not by path."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_llava.core.errors import UserError
from lora_llava.core.storage import cache_folder, file_hash
from lora_llava.evaluation.scoring import evaluate_run
from lora_llava.recipe.io import check_recipe
from lora_llava.runs.checkpoint import list_checkpoints
from lora_llava.runs.identity import IDENTITY_FILE, differences
from tests.ends import act_at
from tests.training.small_runs import PulledPlugError, edited, left_at_4, pull_plug, rewritten, run, same, weights

Content = dict[str, Any]


def other_weights(file: Path, ending: str) -> None:
    tensors = load_file(file)
    name = next(each for each in tensors if each.endswith(ending))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})


def repainted(split: str) -> Callable[[Path], None]:
    def paint(folder: Path) -> None:
        file = sorted((folder / "data" / "images" / split).rglob("image.png"))[-1]
        with Image.open(file) as image:
            width, height = image.size
        Image.new("RGB", (width, height), (7, 8, 9)).save(file)

    return paint


def problem(split: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        def rewrite(problems: Any) -> None:
            next(each for each in problems.values() if each["split"] == split).update(fields)

        edited(folder / "data" / "problems.json", rewrite)

    return change


def swapped_merges(folder: Path) -> None:
    def swap(content: Any) -> None:
        merges = content["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    edited(folder / "parts" / "llm" / "tokenizer.json", swap)


LLM, TOWER = "parts/llm/model.safetensors", "parts/vision_tower/model.safetensors"
CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "language model": (
        lambda folder: other_weights(folder / LLM, "model.norm.weight"),
        r"the language model's weights changed since the run began \(SHA-256 [0-9a-f]{12} then, [0-9a-f]{12} now\); "
        r"restore the weights that it began with, or run with --overwrite",
    ),
    "vision tower": (
        lambda folder: other_weights(folder / TOWER, "pre_layrnorm.weight"),
        r"the vision tower's weights changed since the run began \(.*\); restore .*",
    ),
    "config.json": (
        lambda folder: edited(folder / "parts/llm/config.json", lambda each: each.update(rms_norm_eps=1e-3)),
        r"the model's config.json changed since the run began: text_config.rms_norm_eps was 1e-06 and is 0.001; "
        r"restore .*",
    ),
    "tokenizer": (swapped_merges, r"the tokenizer changed since the run began \(.*\); restore the tokenizer .*"),
    "image processor": (
        lambda folder: edited(
            folder / "parts/vision_tower/preprocessor_config.json", lambda each: each.update(image_mean=[0.4, 0.5, 0.5])
        ),
        r"the image processor changed .*: image_mean was \[0.5, 0.5, 0.5\] and is \[0.4, 0.5, 0.5\]; restore its .*",
    ),
    "training image": (
        repainted("train"),
        r"images of the training rows changed since the run began: 1 of 12, the first is train/\d+/image.png; "
        r"restore them, or run with --overwrite",
    ),
    "validation image": (repainted("val"), r"images of the validation rows changed .*: 1 of 3, the first is val/.*"),
    "test image": (repainted("test"), r"images of the test rows changed .*: 1 of 3, the first is test/.*"),
    "training row": (
        problem("train", solution="Look."),
        r"the training rows are not those that the run began with: 1 of 24, the first is row 1; restore them, .*",
    ),
    "validation row": (
        problem("val", hint="Look."),
        r"the validation rows are not those .*: 1 of 6, the first is row 25; restore them, .*",
    ),
    "what marks a test row": (
        problem("test", subject="language science"),
        r"the test rows are evaluated in another way than when the run began; .*",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_named_and_refused(
    own_content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe = left_at_4(own_content, monkeypatch)
    change, message = CHANGES[name]
    change(tmp_path)
    with pytest.raises(UserError, match=rf"^--resume: {message}$") as error:
        run(recipe, resume=True)
    assert len(str(error.value).splitlines()) == 1
    assert list_checkpoints(Path(recipe.output_dir) / "checkpoints")[0].name == "checkpoint-4"


def test_every_difference_has_its_line(own_content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = left_at_4(own_content, monkeypatch)
    for name in ("language model", "training image", "validation row", "image processor"):
        CHANGES[name][0](tmp_path)
    with pytest.raises(UserError) as error:
        run(recipe, resume=True)
    lines = str(error.value).splitlines()
    assert [" ".join(line.split()[1:5]) for line in lines] == [
        "the language model's weights",
        "the image processor changed",
        "images of the training",
        "the validation rows are",
    ]
    assert all(line.startswith("--resume: ") and line.endswith(", or run with --overwrite") for line in lines)


def test_a_run_with_moved_files_of_the_same_contents_resumes_exactly(
    own_content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_content["output_dir"] = str(tmp_path / "unbroken")
    run(check_recipe(own_content, "test"))
    own_content["output_dir"] = str(tmp_path / "run")
    left_at_4(own_content, monkeypatch)
    for name in ("parts", "data", "run"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    for file in (tmp_path / "elsewhere").rglob("*"):
        os.utime(file)
    monkeypatch.setenv("LORA_LLAVA_CACHE", str(tmp_path / "another cache"))
    there = tmp_path / "elsewhere"
    own_content["model"] |= {"llm": f"{there}/parts/llm", "vision_tower": f"{there}/parts/vision_tower"}
    own_content["data"]["path"], own_content["output_dir"] = f"{there}/data", f"{there}/run"
    output = run(check_recipe(own_content, "test"), resume=True)
    for key, before, now in (
        ("data.path", tmp_path / "data", there / "data"),
        ("model.llm", tmp_path / "parts/llm", there / "parts/llm"),
    ):
        assert f"resume: {key} was '{before}' and is '{now}', with the same content\n" in output
    assert same(weights(there / "run"), weights(tmp_path / "unbroken"))
    before, after = (json.loads((each / "metrics.json").read_text()) for each in (tmp_path / "unbroken", there / "run"))
    assert after["train"]["loss_curve"] == before["train"]["loss_curve"]
    assert (after["before"], after["after"]) == (before["before"], before["after"])


def test_nothing_in_an_identity_is_a_path(
    own_content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(left_at_4(own_content, monkeypatch).output_dir)
    kept = (folder / IDENTITY_FILE).read_bytes()
    assert (folder / "checkpoints" / "checkpoint-4" / IDENTITY_FILE).read_bytes() == kept
    state = (folder / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_bytes()
    for text in (kept, state):
        assert str(tmp_path).encode() not in text
        assert str(cache_folder()).encode() not in text


def test_accepted_evaluation_settings_apply_to_both_tables(
    own_content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(left_at_4(own_content, monkeypatch).output_dir)
    own_content["evaluation"] |= {"max_new_tokens": 3, "before": 4, "after": 4}
    with pytest.raises(
        UserError,
        match=r"the recipe differs from that of step 4: evaluation.after was 2 and is 4; evaluation.before was 2 and "
        r"is 4; evaluation.max_new_tokens was 2 and is 3; undo that, or --accept-changes evaluation$",
    ):
        run(check_recipe(own_content, "test"), resume=True)
    output = run(check_recipe(own_content, "test"), resume=True, accept_changes=["evaluation"])
    assert "the settings of the evaluation changed; the table before training is computed again\n" in output
    for when in ("before", "after"):
        assert len((folder / f"predictions_{when}.jsonl").read_text().splitlines()) == 4


def test_a_repeated_first_table_is_not_reused_with_other_settings(
    own_content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluate with accepted settings, stop the run at once, and resume it with its first settings."""
    recipe = left_at_4(own_content, monkeypatch)
    file = Path(recipe.output_dir) / "predictions_before.jsonl"
    other = check_recipe(own_content | {"evaluation": {"before": 5, "after": 2, "max_new_tokens": 2}}, "test")
    with monkeypatch.context() as patch:
        act_at(5, pull_plug, patch.setattr)
        with pytest.raises(PulledPlugError):
            run(other, resume=True, accept_changes=["evaluation.before"])
    assert len(file.read_text().splitlines()) == 5
    run(recipe, resume=True)
    assert len(file.read_text().splitlines()) == 2


def test_the_first_table_is_kept_if_nothing_changed(own_content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = left_at_4(own_content, monkeypatch)
    evaluated = []

    def recorded(model: Any, plan: Any, when: str) -> Any:
        evaluated.append(when)
        return evaluate_run(model, plan, when)

    monkeypatch.setattr("lora_llava.training.finetune.evaluate_run", recorded)
    run(recipe, resume=True)
    assert evaluated == ["after"]


def test_a_checkpoint_without_identity_is_refused(own_content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = left_at_4(own_content, monkeypatch)
    newest = Path(recipe.output_dir) / "checkpoints" / "checkpoint-4"
    rewritten(newest, lambda folder: (folder / IDENTITY_FILE).unlink())
    with pytest.raises(UserError, match=r"^--resume: .*checkpoint-4 has no identity.json: an earlier version .*"):
        run(recipe, resume=True)


def test_other_libraries_are_reported(own_content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = left_at_4(own_content, monkeypatch)
    newest = Path(recipe.output_dir) / "checkpoints" / "checkpoint-4"

    def older(folder: Path) -> None:
        edited(folder / IDENTITY_FILE, lambda each: each["versions"].update(peft="0.1", pillow="9.0"))

    rewritten(newest, older)
    now = json.loads((newest.parents[1] / IDENTITY_FILE).read_text())["versions"]
    output = run(recipe, resume=True)
    assert (
        f"resume: the run began with other versions: peft 0.1 is now {now['peft']}, pillow 9.0 is now {now['pillow']}; "
        "results may differ in the last digits\n" in output
    )


def test_settings_added_by_another_library_version_are_not_a_difference() -> None:
    before = {"config": {"a": 1}, "image_processor": {"size": 3}, "data": {}, "versions": {"transformers": "5.17"}}
    now = {"config": {"a": 1, "b": 2}, "image_processor": {"size": 3, "do": 1}, "data": {}, "versions": {}}
    assert differences(before, now, {}) == []
    now["versions"] = {"transformers": "5.17"}
    assert [each.partition(":")[2].partition(";")[0] for each in differences(before, now, {})] == [
        " b was None and is 2",
        " do was None and is 1",
    ]


def test_another_stage_1_result_is_refused(
    stage1_content: Content, own_content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage1_content["model"] |= {name: own_content["model"][name] for name in ("llm", "vision_tower")}
    run(check_recipe(stage1_content, "test"))
    own_content["model"]["start_from"] = {"stage1_run": str(tmp_path / "stage1")}
    recipe = left_at_4(own_content, monkeypatch)
    shutil.copytree(tmp_path / "stage1", tmp_path / "stage1 elsewhere")
    file = tmp_path / "stage1" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, file)
    edited(tmp_path / "stage1" / "run.json", lambda each: each.update(adapter_sha256=file_hash(file)))
    with pytest.raises(UserError, match=r"^--resume: the Stage 1 projector changed since the run began .*; name the "):
        run(recipe, resume=True)
    own_content["model"]["start_from"] = {"stage1_run": str(tmp_path / "stage1 elsewhere")}
    output = run(check_recipe(own_content, "test"), resume=True)
    assert "resume: model.start_from.stage1_run was " in output


def conversations(file: Path, count: int, **layout: Any) -> list[Any]:
    """Write rows about images, and the images."""
    rows = []
    (file.parent / "images").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (20, 20), (number * 9, 40, 90)).save(file.parent / "images" / f"{number}.bmp")
        turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": f"number {number}."}]
        rows.append({"id": f"r{number}", "image": f"{number}.bmp", "conversations": turns, "category": "number"})
    file.write_text(json.dumps(rows, **layout))
    return rows


def ask_of(rows: Any, name: str) -> None:
    """Give each file different questions, so that no held-out row is trained."""
    for row in rows:
        row["conversations"][0]["value"] = f"<image>\nWhich of {name}?"


@pytest.fixture
def own_rows(own_content: Content, tmp_path: Path) -> Content:
    """A recipe with two files, held-out validation rows and a test file."""
    for name in ("one", "two", "test"):
        conversations(tmp_path / name / "rows.json", 12)
        edited(tmp_path / name / "rows.json", lambda rows, name=name: ask_of(rows, name))
    sources = [{"path": f"{tmp_path}/{name}/rows.json", "weight": weight} for name, weight in (("one", 1), ("two", 2))]
    own_content["data"] = {
        "format": "conversations",
        "sources": sources,
        "validation_rows": 4,
        "max_length": 400,
        "system_prompt": "",
        "test_source": {"path": f"{tmp_path}/test/rows.json"},
    }
    return own_content


def test_files_with_the_same_rows_in_another_layout_are_the_same(
    own_rows: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_at_4(own_rows, monkeypatch)
    for name in ("one", "two", "test"):
        shutil.rmtree(tmp_path / name)
        conversations(tmp_path / "moved" / name / "rows.json", 12, indent=2)
        edited(tmp_path / "moved" / name / "rows.json", lambda rows, name=name: ask_of(rows, name))
    for source in (*own_rows["data"]["sources"], own_rows["data"]["test_source"]):
        source["path"] = source["path"].replace(str(tmp_path), f"{tmp_path}/moved")
    output = run(check_recipe(own_rows, "test"), resume=True)
    assert "resume: the paths of data.sources changed, with the same content\n" in output
    assert "resume: data.test_source.path was " in output
    assert "computed again" not in output


def other_type(rows: Any) -> None:
    rows[3]["category"] = "another"


def other_answer(rows: Any) -> None:
    rows[3]["conversations"][1]["value"] = "none."


@pytest.mark.parametrize(
    ("file", "change", "output"),
    [
        (
            "one",
            other_answer,
            r"the (training|validation) rows are not those .*, the first is row r3; restore .*",
        ),
        ("test", other_answer, r"the test rows are not those .*: 1 of 12, the first is row r3; restore them, .*"),
        ("test", other_type, r"the test rows are evaluated in another way than when the run began; .*"),
    ],
)
def test_a_changed_row_of_own_data_is_named(
    own_rows: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, change: Any, output: str
) -> None:
    recipe = left_at_4(own_rows, monkeypatch)
    edited(tmp_path / file / "rows.json", change)
    with pytest.raises(UserError, match=rf"^--resume: {output}$"):
        run(recipe, resume=True)


def test_another_image_of_the_same_size_and_time_is_detected(
    own_rows: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = left_at_4(own_rows, monkeypatch)
    file = tmp_path / "test" / "images" / "7.bmp"
    facts = file.stat()
    Image.new("RGB", (20, 20), (1, 2, 3)).save(file)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert file.stat().st_size == facts.st_size
    with pytest.raises(UserError, match=r"^--resume: images of the test rows .*: 1 of 12, the first is 7.bmp; "):
        run(recipe, resume=True)
