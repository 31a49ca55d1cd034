"""ScienceQA: LLaVA's very texts, from the official folder and from parquet."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lora_llava.core.errors import UserError
from lora_llava.data import Conversation, Turn
from lora_llava.data.images.image_sources import BadImageError
from lora_llava.data.scienceqa import PROMPT_ORDERS, format_problem, load_scienceqa, read_problems

METAL = {
    "question": "Which is a metal?",
    "choices": ["wood", "iron", "wool"],
    "answer": 1,
    "hint": "Look closely.",
    "image": "image.png",
    "lecture": "Metals shine.",
    "solution": "Iron shines.",
    "grade": "grade4",
    "subject": "natural science",
    "split": "test",
}
OPTIONS = "Options: (A) wood (B) iron (C) wool"
QUESTION = f"Which is a metal?\nContext: Look closely.\n{OPTIONS}"


@pytest.mark.parametrize(
    ("order", "question", "answer"),
    [
        ("QCM-LEA", QUESTION, "Metals shine. Iron shines. The answer is B."),
        ("QCM-ALE", QUESTION, "The answer is B. BECAUSE: Metals shine. Iron shines."),
        ("CQM-A", f"Context: Look closely.\nQuestion: Which is a metal?\n{OPTIONS}", "The answer is B."),
    ],
)
def test_three_orders(order: Any, question: str, answer: str) -> None:
    assert format_problem(METAL, order) == (question, answer)


@pytest.mark.parametrize(
    ("change", "lea", "ale"),
    [
        ({"lecture": ""}, "Iron shines. The answer is B.", "The answer is B. BECAUSE: Iron shines."),
        ({"lecture": None}, "Iron shines. The answer is B.", "The answer is B. BECAUSE: Iron shines."),
        ({"solution": ""}, "Metals shine. The answer is B.", "The answer is B. BECAUSE: Metals shine."),
        ({"lecture": "", "solution": ""}, " The answer is B.", "The answer is B."),
        (
            {"lecture": "a  b   c    d", "solution": "e "},
            "a b  c  d e The answer is B.",
            "The answer is B. BECAUSE: a b  c  d e",
        ),
        (
            {"lecture": "one\\ntwo", "solution": "three\nfour"},
            "one\ntwo three\nfour The answer is B.",
            "The answer is B. BECAUSE: one\ntwo three\nfour",
        ),
    ],
)
def test_lecture_and_solution_fold_as_the_converter_folds(change: dict[str, Any], lea: str, ale: str) -> None:
    assert format_problem(METAL | change, "QCM-LEA") == (QUESTION, lea)
    assert format_problem(METAL | change, "QCM-ALE") == (QUESTION, ale)


@pytest.mark.parametrize("hint", ["", None])
def test_no_hint_is_n_a(hint: str | None) -> None:
    assert format_problem(METAL | {"hint": hint})[0] == f"Which is a metal?\nContext: N/A\n{OPTIONS}"
    without = {key: value for key, value in METAL.items() if key != "hint"}
    assert format_problem(without, "CQM-A")[0] == f"Context: N/A\nQuestion: Which is a metal?\n{OPTIONS}"


def test_five_options_and_doubled_spaces_in_a_question() -> None:
    problem = METAL | {"question": " Which  one? ", "choices": ["a ", " b", "c", "d", "e"], "answer": 4}
    question, answer = format_problem(problem, "CQM-A")
    assert question == "Context: Look closely.\nQuestion: Which one? \nOptions: (A) a (B) b (C) c (D) d (E) e"
    assert answer == "The answer is E."


@pytest.mark.parametrize("order", PROMPT_ORDERS)
def test_texts_are_those_of_llava_s_converter(shared: Path, order: Any) -> None:
    folder = shared / "scienceqa_sample"
    ours: dict[str, Any] = {}
    for split in ("train", "test"):
        for row in load_scienceqa(folder, split, order=order, image_position="last").conversations:
            turns = [{"from": {"user": "human"}.get(turn.role, "gpt"), "value": turn.text} for turn in row.turns]
            ours[row.row_id] = {"id": row.row_id, "conversations": turns}
            if row.images:
                ours[row.row_id]["image"] = row.images[0].removeprefix(f"{split}/")
    theirs = json.loads((folder / f"llava_conversations_{order}.json").read_text(encoding="utf-8"))
    assert len(theirs) == 444
    assert {row["id"]: row for row in theirs} == ours


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """Four problems in the official layout; 7 and 9 have images, 9 in the folder of another split."""
    folder = tmp_path / "scienceqa"
    text = METAL | {"image": None, "hint": "", "grade": "grade9", "subject": "social science", "answer": 0}
    problems = {"7": METAL, "8": text, "9": METAL | {"split": "val"}, "10": text}
    for split, pid, colour in (("test", "7", (255, 0, 0)), ("val", "9", (0, 0, 255))):
        (folder / "images" / split / pid).mkdir(parents=True)
        Image.new("RGB", (3, 2), colour).save(folder / "images" / split / pid / "image.png")
    write(folder, problems, {"train": ["10"], "val": [], "test": ["9", "8", "7"]})
    return folder


def write(folder: Path, problems: Any, splits: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))


METAL_EXTRA = {
    "answer": 1,
    "num_choices": 3,
    "subject": "natural science",
    "grade": "grade4",
    "has_image": True,
    "has_hint": True,
    "question": "Which is a metal?",
    "choices": ["wood", "iron", "wool"],
    "hint": "Look closely.",
}
ANSWER = Turn("assistant", "Metals shine. Iron shines. The answer is B.")


def test_the_official_folder_in_the_split_s_order(official: Path) -> None:
    rows = load_scienceqa(official, "test").conversations
    turns = (Turn("user", f"<image>\n{QUESTION}"), ANSWER)
    text_extra = METAL_EXTRA | {
        "answer": 0,
        "subject": "social science",
        "grade": "grade9",
        "has_image": False,
        "has_hint": False,
        "hint": "",
    }
    text_turns = (
        Turn("user", f"Which is a metal?\nContext: N/A\n{OPTIONS}"),
        Turn("assistant", "Metals shine. Iron shines. The answer is A."),
    )
    assert rows == [
        Conversation("9", turns, ("val/9/image.png",), METAL_EXTRA),
        Conversation("8", text_turns, (), text_extra),
        Conversation("7", turns, ("test/7/image.png",), METAL_EXTRA),
    ]


def test_images_open_from_the_folder_or_another(official: Path, tmp_path: Path) -> None:
    split = load_scienceqa(official, "test")
    assert split.images.open("test/7/image.png").getpixel((2, 1)) == (255, 0, 0)
    assert split.images.open("val/9/image.png").getpixel((0, 0)) == (0, 0, 255)
    moved = tmp_path / "elsewhere"
    (official / "images").rename(moved)
    assert load_scienceqa(official, "test", image_folder=moved).images.open("test/7/image.png").size == (3, 2)
    with pytest.raises(BadImageError, match=r"^image test/7/image.png is missing$"):
        split.images.open("test/7/image.png")


def test_the_pixel_cap_reaches_the_images(official: Path) -> None:
    images = load_scienceqa(official, "test", max_image_pixels=5).images
    with pytest.raises(BadImageError, match=r"^image test/7/image.png has 3 x 2 pixels, over max_image_pixels 5$"):
        images.open("test/7/image.png")


@pytest.mark.parametrize("position", ["first", "last"])
def test_the_image_s_place(official: Path, position: Any) -> None:
    expected = f"<image>\n{QUESTION}" if position == "first" else f"{QUESTION}\n<image>"
    rows = load_scienceqa(official, "test", image_position=position).conversations
    assert [rows[0].turns[0].text, rows[2].turns[0].text] == [expected, expected]
    assert "<image>" not in rows[1].turns[0].text


def test_a_coin_per_row_is_the_seed_s_whatever_else_is_read(tmp_path: Path) -> None:
    ids = [str(number) for number in range(200)]
    write(tmp_path, dict.fromkeys(ids, METAL), {"all": ids, "some": ids[::-7]})

    def firsts(split: str, seed: int) -> dict[str, bool]:
        rows = load_scienceqa(tmp_path, split, image_position="random", seed=seed).conversations
        assert all(row.turns[0].text in (f"<image>\n{QUESTION}", f"{QUESTION}\n<image>") for row in rows)
        return {row.row_id: row.turns[0].text.startswith("<image>") for row in rows}

    everything, some = firsts("all", 0), firsts("some", 0)
    assert everything == firsts("all", 0)
    assert some == {pid: everything[pid] for pid in ids[::-7]}
    assert firsts("all", 1) != everything
    assert 70 < sum(everything.values()) < 130  # 4 standard deviations about 100


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in METAL.items() if name != key}


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (without("question"), "row 1: the field 'question' is missing; add it"),
        (without("choices"), "row 1: the field 'choices' is missing; add it"),
        (without("answer"), "row 1: the field 'answer' is missing; add it"),
        (METAL | {"answer": 3}, "row 1: answer is 3; it should index its 3 choices (2 to 5)"),
        (METAL | {"answer": -1}, "row 1: answer is -1; it should index its 3 choices (2 to 5)"),
        (METAL | {"answer": "1"}, "row 1: answer is '1'; it should index its 3 choices (2 to 5)"),
        (METAL | {"solution": [[]]}, "row 1: solution is [[]]; it should be a string"),
        (METAL | {"answer": None}, "row 1: answer is None; it should index its 3 choices (2 to 5)"),
        (METAL | {"choices": list("abcdef")}, "row 1: answer is 1; it should index its 6 choices (2 to 5)"),
    ],
)
def test_a_problem_that_cannot_be_asked_is_refused(tmp_path: Path, problem: dict[str, Any], message: str) -> None:
    write(tmp_path, {"1": problem}, {"test": ["1"]})
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_scienceqa(tmp_path, "test")


@pytest.mark.parametrize("change", [{"choices": None}, {"choices": ["one"], "answer": 0}, {"question": None}])
def test_a_field_of_the_wrong_kind_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path, {"1": METAL | change}, {"test": ["1"]})
    with pytest.raises(UserError, match="row 1"):
        load_scienceqa(tmp_path, "test")


def test_an_unknown_split_names_the_nearest(official: Path) -> None:
    message = f"{official / 'pid_splits.json'}: no split 'tset' (did you mean \"test\"?); it has train, val, test"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_scienceqa(official, "tset")


def test_an_empty_split_is_refused(official: Path) -> None:
    message = f"data.splits: split 'val' of {official} is empty; name another, or set null if it is optional"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_scienceqa(official, "val")


def test_files_that_do_not_fit_are_named(official: Path, tmp_path: Path) -> None:
    problems, splits = official / "problems.json", official / "pid_splits.json"
    splits.write_text('{"test": ["7", "12"]}')
    message = f"{splits}: split 'test' names problem 12, which problems.json lacks"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        read_problems(problems, splits, "test")
    splits.write_text("{")
    with pytest.raises(UserError, match=f"^{re.escape(str(splits))}: not JSON: "):
        load_scienceqa(official, "test")
    problems.unlink()
    message = f"{problems} is missing; a ScienceQA folder holds problems.json, pid_splits.json and images/"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_scienceqa(official, "test")


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's form: three rows, the second without image."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (0, 255, 0)).save(file, "PNG")
    drawn = {"bytes": file.getvalue(), "path": None}
    broken = {"bytes": b"not an image", "path": None}
    row = {key: METAL[key] for key in METAL if key not in ("image", "split")}
    row |= {"task": "closed choice", "topic": "chemistry", "category": "matter", "skill": "Name metals"}
    rows = [{"image": image} | row for image in (drawn, None, broken)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), *((key, pa.string()) for key in row if key not in ("choices", "answer"))])
    schema = schema.append(pa.field("choices", pa.list_(pa.string()))).append(pa.field("answer", pa.int8()))
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "validation-00000-of-00001.parquet")
    return folder.parent


def test_parquet_rows_are_the_same_conversations(parquet: Path) -> None:
    rows, images = load_scienceqa(parquet, "val")
    shown = (Turn("user", f"<image>\n{QUESTION}"), ANSWER)
    bare = (Turn("user", QUESTION), ANSWER)
    assert rows == [
        Conversation("0", shown, ("0",), METAL_EXTRA),
        Conversation("1", bare, (), METAL_EXTRA | {"has_image": False}),
        Conversation("2", shown, ("2",), METAL_EXTRA),
    ]
    drawn = images.open("0")
    assert (drawn.size, drawn.mode, drawn.getpixel((0, 0))) == ((3, 2), "RGB", (0, 255, 0))
    with pytest.raises(BadImageError, match=r"^image of row 1 is missing$"):
        images.open("1")
    with pytest.raises(BadImageError, match=r"^image of row 2 cannot be read: "):
        images.open("2")


def test_a_parquet_file_that_cannot_be_read_is_named(parquet: Path) -> None:
    (parquet / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=f"^data.path: {re.escape(str(parquet))}, split 'test', cannot be read: "):
        load_scienceqa(parquet, "test")


def test_parquet_without_the_column_image_is_reported(parquet: Path) -> None:
    file = parquet / "data" / "validation-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).drop_columns("image"), file)
    with pytest.raises(UserError, match="image"):
        load_scienceqa(parquet, "val")


def test_an_unknown_parquet_split_is_reported(parquet: Path) -> None:
    with pytest.raises(UserError, match="no split 'tset'"):
        load_scienceqa(parquet, "tset")


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(UserError, match=f"^data.path: {re.escape(str(missing))}, split 'test', cannot be read: "):
        load_scienceqa(missing, "test")
