"""Sources: files and folders of rows with their images, what names them and what is said where they are not there."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lora_llava.core.errors import UserError
from lora_llava.data import Conversation, Turn
from lora_llava.data.formats import Columns, RowError
from lora_llava.data.images.image_sources import BadImageError, FolderImages, TableImages
from lora_llava.data.sources import Source, list_source, open_source

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
TURNS = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A cube."}]
SHOWN = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cube."))
CHAT = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cube."}]


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def row(name: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "image": f"{name}.png", "conversations": TURNS, **more}


def write(file: Path, rows: Any) -> Path:
    file.write_text(json.dumps(rows))
    return file


def wanted(name: str) -> Conversation:
    return Conversation(name, SHOWN, (f"{name}.png",))


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), COLOURS[colour]).save(file, "PNG")
    return file.getvalue()


def colour(source: Source, name: str) -> Any:
    return source.images.open(name).getpixel((0, 0))


def test_a_file_s_rows_become_conversations(images: Path) -> None:
    nameless = {key: value for key, value in row("green").items() if key != "id"}
    file = write(images.parent / "chat.json", [row("red"), nameless, row("blue", id=12)])
    source = open_source(file, image_folder=images)
    expected = [wanted("red"), replace(wanted("green"), row_id="1"), replace(wanted("blue"), row_id="12")]
    assert list(source.read()) == list(source.read()) == expected
    assert (source.name, source.file) == ("chat", file)
    assert colour(source, "blue.png") == COLOURS["blue"]


def test_a_folder_with_one_file_is_opened(images: Path) -> None:
    file = write(images / "chat.json", [row("red")])
    source = open_source(images, name="mine")
    assert (source.name, source.file, list(source.read())) == ("mine", file, [wanted("red")])


def test_a_bad_row_is_given_with_its_name_and_the_next_one_is_read(tmp_path: Path) -> None:
    rows = [row("red"), row("7", conversations=[]), "text", {"image": "a.png"}, row("blue")]
    found = list(open_source(write(tmp_path / "chat.json", rows)).read())
    assert [each.row_id for each in found] == ["red", "7", "2", "3", "blue"]
    assert [each.kind for each in found if isinstance(each, RowError)] == [
        "empty conversation",
        "malformed row",
        "missing column",
    ]


@pytest.mark.parametrize("named", ["beside", "images", "explicit"])
def test_images_are_looked_for_beside_the_file(tmp_path: Path, named: str) -> None:
    folder = tmp_path if named == "beside" else tmp_path / ("images" if named == "images" else "other")
    folder.mkdir(exist_ok=True)
    (folder / "red.png").write_bytes(png("red"))
    if named == "explicit":
        (tmp_path / "images").mkdir()
    file = write(tmp_path / "chat.json", [row("red")])
    source = open_source(file, image_folder=folder if named == "explicit" else None, max_image_pixels=16)
    assert isinstance(source.images, FolderImages)
    assert (source.images.root, source.images.max_pixels) == (folder, 16)
    assert colour(source, "red.png") == COLOURS["red"]


def test_missing_paths_are_reported(tmp_path: Path) -> None:
    def reported(message: str, path: Any, **more: Any) -> None:
        with pytest.raises(UserError) as caught:
            open_source(path, where="data.sources.1.path", **more)
        assert str(caught.value) == message

    kinds = ".json, .jsonl, .ndjson, .csv, .tsv, .parquet"
    missing = tmp_path / "chat.json"
    reported(f"data.sources.1.path: {missing} is missing; it should be a file such as chat.json", missing)
    reported(f"data.sources.1.path: {tmp_path} is a folder; name its file of rows ({kinds}); it has: none", tmp_path)
    (tmp_path / "chat.txt").write_text("x")
    reported(
        f"data.sources.1.path: {tmp_path / 'chat.txt'} is of an unknown kind; use one of {kinds}", tmp_path / "chat.txt"
    )
    write(missing, [])
    reported(
        f"data.sources.1.image_folder: the folder {tmp_path / 'no'} does not exist; name the root folder of the images",
        missing,
        image_folder=tmp_path / "no",
    )
    write(tmp_path / "more.json", [])
    reported(
        f"data.sources.1.path: {tmp_path} is a folder; name its file of rows ({kinds}); it has: chat.json, more.json",
        tmp_path,
    )


def test_nothing_is_read_until_it_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text(f"[{json.dumps(row('red'))}, nonsense]")
    read = open_source(file).read()
    with pytest.raises(UserError):
        list(read)


def fingerprint(file: Path, **settings: Any) -> str:
    return open_source(file, **settings).fingerprint


def test_a_fingerprint_changes_with_all_that_decides_the_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "chat.json", [row("red")])
    settings: list[dict[str, Any]] = [
        {},
        {"form": "captions"},
        {"columns": Columns(question="q")},
        {"position": "last"},
        {"seed": 1},
    ]
    found = [fingerprint(file, **each) for each in settings]
    write(file, [row("blue")])
    assert len({*found, fingerprint(file)}) == 6
    write(file, [row("red")])
    assert [fingerprint(file, **each) for each in settings] == found
    (tmp_path / "other").mkdir()
    copy = write(tmp_path / "other" / "copy.json", [row("red")])
    assert fingerprint(copy, name="x", image_folder=tmp_path, max_image_pixels=1) == found[0]


@pytest.mark.parametrize(
    ("text", "names"), [("question\tanswer,b,c\na\tb,c,d\n", ("a.csv", "a.tsv")), ("[]", ("a.json", "a.jsonl"))]
)
def test_a_fingerprint_changes_with_the_file_s_kind(tmp_path: Path, text: str, names: tuple[str, str]) -> None:
    for name in names:
        (tmp_path / name).write_text(text)
    first, second = (open_source(tmp_path / name) for name in names)
    assert repr(list(first.read())) != repr(list(second.read()))
    assert first.fingerprint != second.fingerprint


def test_a_fingerprint_is_the_file_s_however_it_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("question\tanswer\na\tb\n")
    as_csv = fingerprint(tmp_path)
    assert fingerprint(file) == as_csv
    file.rename(tmp_path / "a.tsv")
    assert fingerprint(tmp_path) != as_csv


def test_rows_are_picked_in_the_order_asked_for(tmp_path: Path) -> None:
    rows = [row(str(number)) for number in range(10)] + [{"id": "bad"}]
    source = open_source(write(tmp_path / "chat.json", rows))
    assert source.pick([7, 0, 3, 7]) == [wanted("7"), wanted("0"), wanted("3"), wanted("7")]
    assert source.pick(iter([9])) == [wanted("9")]
    assert source.pick([]) == []


def test_no_more_is_read_than_is_picked() -> None:
    def read() -> Iterator[Conversation]:
        yield from map(wanted, "abc")
        raise AssertionError("too much was read")

    source = Source("a", FolderImages(Path(), 1), "", read)
    assert source.pick([2, 1]) == [wanted("c"), wanted("b")]
    assert source.pick([]) == []


def test_a_list_of_conversations_is_a_source() -> None:
    rows, images = [wanted("a"), wanted("b")], FolderImages(Path(), 1)
    source = list_source("x", rows, images)
    assert (source.name, source.images, source.file) == ("x", images, None)
    assert list(source.read()) == list(source.read()) == rows
    assert list_source("y", list(rows), images).fingerprint == source.fingerprint
    for change in ({"row_id": "c"}, {"images": ("c.png",)}, {"turns": SHOWN[:1]}):
        changed = list_source("x", [rows[0], replace(rows[1], **change)], images)  # type: ignore[arg-type]
        assert changed.fingerprint != source.fingerprint


def embedded(file: Path, rows: list[dict[str, Any]], features: datasets.Features) -> Path:
    """A Parquet file as `datasets` writes it, its images inside."""
    datasets.Dataset.from_list(rows, features=features).to_parquet(file)
    return file


def test_parquet_with_its_images_inside(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    rows = [
        {"image": {"bytes": png(name), "path": None}, "question": "<image>\nWhat?", "answer": "A cube."}
        for name in COLOURS
    ]
    source = open_source(embedded(tmp_path / "a.parquet", [*rows, rows[0] | {"image": None}], features))
    assert isinstance(source.images, TableImages)
    read = list(source.read())
    assert read[:3] == [Conversation(str(n), SHOWN, (str(n),)) for n in range(3)]
    assert isinstance(read[3], RowError)
    assert str(read[3]) == "1 <image> placeholders for 0 images; make them equal"
    assert [colour(source, str(n)) for n in range(3)] == list(COLOURS.values())
    assert source.images.read("1") == png("green")
    with pytest.raises(BadImageError, match=r"^image of row 3 is missing$"):
        source.images.open("3")


def test_parquet_with_lists_of_images_inside(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        }
    )
    stored = {name: {"bytes": png(name), "path": f"{name}.png"} for name in COLOURS}
    both = [{"role": "user", "content": "<image><image>"}, CHAT[1]]
    rows = [
        {"images": [stored["red"], stored["blue"]], "messages": both},
        {"images": [stored["green"]], "messages": CHAT},
        {"images": [], "messages": [{"role": "user", "content": "What?"}, CHAT[1]]},
    ]
    source = open_source(embedded(tmp_path / "a.parquet", rows, features))
    assert list(source.read()) == [
        Conversation("0", (Turn("user", "<image><image>"), SHOWN[1]), ("0:0", "0:1")),
        Conversation("1", SHOWN, ("1",)),
        Conversation("2", (Turn("user", "What?"), SHOWN[1])),
    ]
    assert [colour(source, name) for name in ("0:0", "0:1", "1")] == [COLOURS[n] for n in ("red", "blue", "green")]


def test_parquet_with_its_images_names(images: Path) -> None:
    file = images.parent / "a.parquet"
    rows = [{"id": name, "image": f"{name}.png", "question": "<image>What?", "answer": "A cube."} for name in COLOURS]
    pq.write_table(pa.Table.from_pylist(rows), file)
    source = open_source(file, image_folder=images)
    assert list(source.read()) == [wanted(name) for name in COLOURS]
    assert colour(source, "green.png") == COLOURS["green"]
    (images / "images").mkdir()
    inside = open_source(Path(file.rename(images / "a.parquet"))).images
    assert isinstance(inside, FolderImages)
    assert inside.root == images / "images"


@pytest.mark.parametrize(
    ("columns", "settings", "lacking"),
    [
        (["id", "frage"], {}, "conversations, messages, or question and answer"),
        (["id", "question"], {}, "answer"),
        (["id", "text"], {"form": "captions"}, "conversations, messages, question and answer, or caption"),
        (["id", "question"], {"columns": Columns(answer="antwort")}, "antwort"),
    ],
)
def test_parquet_without_the_columns_lists_what_it_has(
    tmp_path: Path, columns: list[str], settings: dict[str, Any], lacking: str
) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([dict.fromkeys(columns, "x")]), file)
    with pytest.raises(UserError) as caught:
        open_source(file, **settings)
    assert str(caught.value) == (
        f"{file}: it lacks {lacking}; it has {', '.join(columns)}; name its columns with data.columns"
    )


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_tables_are_read_with_their_images(images: Path, name: str) -> None:
    sign = "\t" if name == "a.tsv" else ","
    lines = [["id", "image", "question", "answer"], ["red", "red.png", "What?", "A cube."], ["x", "", "What?", "5"]]
    (images / name).write_text("".join(sign.join(line) + "\n" for line in lines))
    source = open_source(images / name)
    assert list(source.read()) == [wanted("red"), Conversation("x", (Turn("user", "What?"), Turn("assistant", "5")))]
    assert colour(source, "red.png") == COLOURS["red"]
