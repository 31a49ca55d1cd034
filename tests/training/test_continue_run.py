"""A run continues a finished one: its adapter, its base, and the sides of its rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava import merge
from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.data.images.image_check import inspect_images
from lora_llava.data.images.image_sources import FolderImages
from lora_llava.planning.run_plan import plan_run
from lora_llava.publishing.card.model_card import add_card
from lora_llava.publishing.package import collect
from lora_llava.recipe import load_recipe
from lora_llava.runs.checkpoint import list_checkpoints
from lora_llava.splits.seen_rows import read_seen
from lora_llava.splits.split_rows import Split
from lora_llava.training import finetune
from tests.ends import act_at
from tests.own_rows import written
from tests.training.continued import SUFFIXES, first_run, more, painted
from tests.training.small_runs import PulledPlugError, pull_plug, run, same, weights


@pytest.fixture(scope="module")
def first(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_run(tmp_path_factory.mktemp("first"), parts)


@pytest.fixture(scope="module")
def second(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that continues the first."""
    folder = tmp_path_factory.mktemp("second")
    run(load_recipe(more(folder, first)))
    return folder


def numbers(split: Split) -> set[int]:
    """The numbers of a split's images and questions, from the ids of its rows."""
    return {int(split.rows[i]["row_id"].removeprefix("r")) for i in range(len(split.rows))}


def splits_of(recipe: Path) -> dict[str, set[int]]:
    return {name: numbers(split) for name, split in plan_run(load_recipe(recipe)).splits.items()}


def test_no_row_changes_sides(first: Path, tmp_path: Path) -> None:
    before = splits_of(first / "recipe.yaml")
    plan = plan_run(load_recipe(more(tmp_path, first)))
    now = {name: numbers(split) for name, split in plan.splits.items()}
    assert before["test"] < now["test"]
    assert before["validation"] < now["validation"]
    assert (now["test"] | now["validation"]) & before["train"] == set()
    assert before["train"] < now["train"]
    assert {len(now["test"]), len(now["validation"])} == {8, 5}
    assert set.union(*now.values()) == {*range(24), *range(100, 116), 200, 201}
    assert sum(map(len, now.values())) == 42
    assert plan.notes == (
        f"8 held-out rows of {first}/run stay held out: 3 in validation and 5 in test",
        f"16 rows are not held out: their images or questions were trained in {first}/run",
    )


def test_files_of_other_formats_are_the_same_image(first: Path, tmp_path: Path) -> None:
    more(tmp_path, first)
    names = [f"copy {place}é{SUFFIXES[place % 4]}" for place in range(20)]
    found = inspect_images(FolderImages(tmp_path / "images", 10**6), names)
    original = inspect_images(FolderImages(first / "images", 10**6), [f"{n}.png" for n in range(20)])
    assert [each.pixels for each in found.values()] == [each.pixels for each in original.values()]
    assert len({each.digest for each in [*found.values(), *original.values()]}) == 35  # PNG copies are equal files
    assert len({each.pixels for each in found.values()}) == 20
    painted(0).save(tmp_path / "images" / "lossy.jpg")
    lossy = inspect_images(FolderImages(tmp_path / "images", 10**6), ["lossy.jpg"])["lossy.jpg"]
    assert lossy.pixels != found[names[0]].pixels


def test_the_adapter_is_the_first_runs(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first step a run has the weights of the other bit for bit, and its base stays as it is."""
    seen: dict[str, Any] = {}
    train = finetune.train

    def look(plan: Any, base: Any, model: Any, *rest: Any) -> Any:
        model.save_pretrained(tmp_path / "start")
        seen.update({name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad})
        found = train(plan, base, model, *rest)
        assert seen
        assert all(torch.equal(seen[name], p) for name, p in model.named_parameters() if name in seen)
        return found

    monkeypatch.setattr(finetune, "train", look)
    output = run(load_recipe(more(tmp_path, first)))
    assert f"continues {first}/run: its adapter and projector, with a new optimizer and schedule" in output
    assert same(weights(tmp_path / "start"), weights(first / "run"))
    assert not same(weights(tmp_path / "run"), weights(first / "run"))
    record, before = (json.loads((folder / "run" / "run.json").read_text()) for folder in (tmp_path, first))
    assert record["base"] == before["base"]
    assert record["continues"]["adapter_sha256"] == before["adapter_sha256"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["continues"]["run"] == f"{first}/run"
    assert len(metrics["continues"]["rows"]) == 2


def test_a_continued_run_resumes_to_the_same_bits(
    first: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = more(tmp_path, first)
    with monkeypatch.context() as patch:
        act_at(5, pull_plug, patch.setattr)
        with pytest.raises(PulledPlugError):
            run(load_recipe(recipe))
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[0].name == "checkpoint-4"
    run(load_recipe(recipe), resume=True)
    assert same(weights(tmp_path / "run"), weights(second / "run"))
    metrics = [json.loads((folder / "run" / "metrics.json").read_text()) for folder in (tmp_path, second)]
    assert metrics[0]["after"] == metrics[1]["after"]


def test_a_third_run_keeps_the_sides_of_both(first: Path, second: Path, tmp_path: Path, capsys: Any) -> None:
    """The first run may be gone: the second is moved, evaluates, merges, reports, and is continued without its data."""
    sides = splits_of(second / "recipe.yaml")
    moved = tmp_path / "moved"
    shutil.copytree(second / "run", moved)
    file = moved / "recipe.yaml"
    file.write_text(file.read_text().replace(f"{first}/run", f"{first}/gone"))
    assert main("evaluate", [str(moved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((moved / "metrics.json").read_text())["after"]
    assert main("report", [str(moved)]) == 0
    assert main("merge", [str(moved), "--output", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    assert main("evaluate", [str(tmp_path / "merged")]) == 0
    file.write_text(file.read_text().replace(f"{second}/rows.json", f"{second}/gone.json"))
    third = more(tmp_path / "three", tmp_path, model={"start_from": {"run": str(moved)}})
    found = splits_of(third)
    assert found == sides
    record = read_seen(moved)
    assert record is not None
    assert record[1] is not None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "lora.r=8",
            r"^lora\.r is 8, but .*/run, which the recipe continues, has 4; leave it out, or merge the run .*"
            r"train a new adapter with model\.start_from=\{llava: MERGED\}$",
        ),
        ("lora.dora=true", r"lora\.dora is true, but .* has false"),
        ("model.quantization=none", r'model\.quantization is "none", but .* has "nf4"'),
        ("model.new_tokens=[<a>]", r'model\.new_tokens is \["<a>"\], but .* has \[\]'),
        ("data.system_prompt=Hi.", r'data\.system_prompt is "Hi\.", but .* with another template or system text;'),
        ("data.template=plain", r"data\.template is plain and .* leave both out"),
        ("data.image_aspect=crop", r'data\.image_aspect is "crop", but .* has "pad"; leave it out'),
        (
            "model.llm=demo",
            r"^model\.llm is demo, but .*/run, which the recipe continues, was trained on .*/llm and .*;"
            r" leave model\.llm out, or train a new adapter on the new base$",
        ),
        ("model.start_from.run=nowhere", r"model\.start_from\.run: the folder nowhere does not exist.*; name a run"),
    ],
)
def test_what_differs_is_refused(first: Path, tmp_path: Path, override: str, message: str) -> None:
    recipe = more(tmp_path, first)
    with pytest.raises(UserError, match=message) as refused:
        plan_run(load_recipe(recipe, [override]))
    assert "\n" not in str(refused.value)


def test_a_recipe_that_names_the_same_base_elsewhere_is_accepted(first: Path, parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts, tmp_path / "parts")
    parts_again = [f"model.{name}={tmp_path}/parts/{name}" for name in ("llm", "vision_tower")]
    assert plan_run(load_recipe(more(tmp_path, first), [*parts_again, "lora.r=4", "lora.dropout=0.1"])).notes


def test_a_run_that_is_not_finished_names_resume(first: Path, tmp_path: Path) -> None:
    shutil.copytree(first / "run", tmp_path / "open")
    for name in ("run.json", "metrics.json"):
        (tmp_path / "open" / name).unlink()
    recipe = more(tmp_path, first)
    message = (
        rf"{tmp_path}/open is not finished; finish it with lora-llava finetune {tmp_path}/open/recipe\.yaml --resume"
    )
    with pytest.raises(UserError, match=message):
        plan_run(load_recipe(recipe, [f"model.start_from.run={tmp_path}/open"]))


def test_a_run_is_not_written_over_itself(first: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"output_dir: .* is the run that the recipe continues; set output_dir=OTHER"):
        run(load_recipe(more(tmp_path, first), [f"output_dir={first}/run"]), overwrite=True)
    assert (first / "run" / "run.json").is_file()


def test_the_flag_writes_the_key(first: Path, tmp_path: Path) -> None:
    recipe = more(tmp_path, first)
    assert (
        main(
            "finetune",
            [
                str(first / "recipe.yaml"),
                "--continue",
                str(first / "run"),
                "training.max_steps=1",
                f"data.path={tmp_path}/rows.json",
                f"output_dir={tmp_path}/run",
            ],
        )
        == 0
    )
    found = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert found.model.start_from.run == f"{first}/run"
    assert found.lora == load_recipe(recipe).lora
    assert found.data.system_prompt == ""


def test_rows_that_a_run_held_out_are_not_trained_where_none_are_drawn(first: Path, tmp_path: Path) -> None:
    before = splits_of(first / "recipe.yaml")
    recipe = load_recipe(more(tmp_path, first, evaluation=None, data={"test_rows": 0, "validation_rows": 0}))
    plan = plan_run(recipe)
    assert set(plan.splits) == {"train"}
    assert numbers(plan.splits["train"]) & (before["test"] | before["validation"]) == set()
    assert plan.notes == (
        f"3 rows are neither trained nor evaluated: held out for validation in {first}/run; set data.validation_rows=3 "
        "to evaluate them",
        f"5 rows are neither trained nor evaluated: held out for test in {first}/run; set data.test_rows=5 to evaluate "
        "them",
    )


def test_a_named_source_loses_the_rows_that_were_trained(first: Path, tmp_path: Path) -> None:
    before = splits_of(first / "recipe.yaml")
    recipe = more(tmp_path, first, data={"test_rows": 0, "validation_rows": 0})
    source = {"path": str(first / "rows.json")}
    plan = plan_run(load_recipe(recipe, [f"data.test_source={json.dumps(source)}"]))
    assert numbers(plan.splits["test"]) == before["test"] | before["validation"]
    assert f"16 rows are kept out of test, of 24: their images or questions were trained in {first}/run" in plan.notes
    trained = [row for row in json.loads((first / "rows.json").read_text()) if int(row["id"][1:]) in before["train"]]
    source = {"path": written(tmp_path / "all.json", trained), "image_folder": str(first / "images")}
    with pytest.raises(
        UserError, match=r"data\.test_source: .* trained the images of all its 16 rows; name other rows"
    ):
        plan_run(load_recipe(recipe, [f"data.test_source={json.dumps(source)}"]))


def test_rows_that_link_both_sides_are_left_out(first: Path, tmp_path: Path) -> None:
    before = splits_of(first / "recipe.yaml")
    recipe = more(tmp_path, first)
    rows = json.loads((tmp_path / "rows.json").read_text())
    images = {row["id"]: row.get("image") for row in rows}
    pair = [images[f"r{next(iter(before[name] - set(range(20, 24))))}"] for name in ("train", "test")]
    turns = [{"from": "human", "value": "<image>\n<image>\nWhich?"}, {"from": "gpt", "value": "Both."}]
    rows.append({"id": "r300", "conversations": turns, "image": pair})
    written(tmp_path / "rows.json", rows)
    plan = plan_run(load_recipe(recipe))
    assert all(300 not in numbers(split) for split in plan.splits.values())
    assert plan.notes[-1] == (f"1 row is left out, with images that {first}/run trained and images that it held out")


def test_nothing_new_to_hold_out_is_refused(first: Path, tmp_path: Path) -> None:
    recipe = more(tmp_path, first)
    before = splits_of(first / "recipe.yaml")
    rows = json.loads((tmp_path / "rows.json").read_text())
    written(tmp_path / "rows.json", [row for row in rows if int(row["id"][1:]) in before["train"]])
    with pytest.raises(UserError, match=r"data\.validation_rows is 5, but .* trained the images of all rows; add new"):
        plan_run(load_recipe(recipe))
    written(tmp_path / "rows.json", [row for row in rows if int(row["id"][1:]) in before["train"] | {200, 201}])
    with pytest.raises(UserError, match=r"which holds out all 2 rows that .* did not have; leave some to train on"):
        plan_run(load_recipe(recipe, ["data.test_rows=0"]))


def test_a_run_without_a_record_is_read_again(first: Path, tmp_path: Path) -> None:
    """An earlier version recorded no images; its data gives them, and where that is gone the plan says so."""
    shutil.copytree(first, tmp_path / "old")
    old = tmp_path / "old" / "run"
    (old / "seen_rows.json").unlink()
    saved_recipe = old / "recipe.yaml"
    saved_recipe.write_text(saved_recipe.read_text().replace(str(first), str(tmp_path / "old")))
    recipe = more(tmp_path / "two", tmp_path / "old")
    expected = splits_of(more(tmp_path / "expected", first))
    assert splits_of(recipe) == expected
    shutil.rmtree(tmp_path / "old" / "images")
    (tmp_path / "old" / "rows.json").unlink()
    notes = plan_run(load_recipe(recipe)).notes
    assert "recorded no images (an earlier version trained it), and its data cannot be read" in notes[0]


def test_card_and_report_name_the_run_that_is_continued(first: Path, second: Path, tmp_path: Path) -> None:
    assert f"{first}/run" in (second / "run" / "report.html").read_text()
    merge(second / "run", tmp_path / "merged", dtype="float32", quiet=True)
    for folder, repo in ((second / "run", "me/base"), (tmp_path / "merged", None)):
        package = collect(folder, repo, "0" * 40)
        add_card(package, "me/more")
        content = package.files["README.md"]
        assert isinstance(content, bytes)
        card = content.decode()
        digest = json.loads((first / "run" / "run.json").read_text())["adapter_sha256"][:12]
        assert f"| continues | the adapter and projector of run, SHA-256 `{digest}`, trained on rows.json |" in card
        assert "trained on rows.json, after rows.json, with lora_llava" in card
        content = b"".join(each for each in package.files.values() if isinstance(each, bytes))
        assert str(first.parent).encode() not in content
    merged = more(tmp_path / "three", first, model={"start_from": {"llava": str(tmp_path / "merged")}}, lora={"r": 2})
    assert splits_of(merged) == splits_of(second / "recipe.yaml")  # a new adapter on the merged model knows them too
