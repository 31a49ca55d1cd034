"""Contexts that cannot be read: what is said of the file, the row and the value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.core.errors import UserError
from lora_llava.synthesis.contexts.coco_contexts import json_items
from lora_llava.synthesis.contexts.context import Box
from lora_llava.synthesis.contexts.reading_contexts import read_contexts
from tests.synthesis.context_files import CATEGORIES, IMAGES, captions, instances, save, told


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"box_format": "cxcywh"}, ": box_format is 'cxcywh'; say xyxy or xywh, or leave it out"),
        ({"box_unit": None}, ": box_unit is None; say fraction or pixel, or leave it out"),
        ({"boxes": 3, "box_format": "xyxy", "box_unit": "pixel"}, ": boxes is 3; it should be a list"),
        ({}, ", box 1: width is None; boxes in pixels need the image's width in pixels"),
        ({"width": 640, "height": 0}, ", box 1: height is 0; boxes in pixels need the image's height in pixels"),
        ({"box": [5, 5, 4, 9]}, ", box 1: bbox [5, 5, 4, 9] cannot be xyxy: its second corner comes before its first"),
        ({"box": [5, 5, 9, 4]}, ", box 1: bbox [5, 5, 9, 4] cannot be xyxy: its second corner comes before its first"),
        (
            {"box": [5, 5, -4, 9], "box_format": "xywh"},
            ", box 1: bbox [5, 5, -4, 9] cannot be xywh: a width or height is below 0",
        ),
        (
            {"box": [0.1, 0.2, 0.3, 0.4], "width": 640, "height": 480},
            ", box 1: bbox [0.1, 0.2, 0.3, 0.4] cannot be pixels: no number is over 1; are they fractions?",
        ),
        (
            {"box": [1, 2, 3000, 4], "width": 640, "height": 480},
            ", box 1: bbox [1, 2, 3000, 4] cannot be pixels of an image of 640 x 480: it lies more than a whole image "
            "outside",
        ),
        (
            {"box": [1, 2, 30, 40], "box_unit": "fraction"},
            ", box 1: bbox [1, 2, 30, 40] cannot be fractions of an image: a corner is 40; are they pixels?",
        ),
        ({"box": [1, 2, 3]}, ", box 1: bbox is [1, 2, 3]; it should be a list of four numbers"),
        ({"box": [1, 2, 3, True]}, ", box 1: bbox is [1, 2, 3, True]; it should be a list of four numbers"),
        ({"box": "1 2 3 4"}, ", box 1: bbox is '1 2 3 4'; it should be a list of four numbers"),
        (
            {"boxes": [{"bbox": [1, 2, 3, 4]}], "box_format": "xyxy", "box_unit": "pixel"},
            ", box 1: it is {'bbox': [1, 2, 3, 4]}; it should have a label, or category, and a bbox",
        ),
        ({"label": " \x00", "width": 640, "height": 480}, ": a box has no label; say what it is"),
    ],
)
def test_what_own_boxes_cannot_be_is_told(tmp_path: Path, entry: dict[str, Any], problem: str) -> None:
    plain = "boxes" in entry or entry.keys() == {"box_format"}
    box = {"label": entry.pop("label", "dog"), "bbox": entry.pop("box", [1, 2, 3, 4])}
    whole = {"boxes": [box]} | ({} if plain else {"box_format": "xyxy", "box_unit": "pixel"}) | entry
    fine = {"boxes": [], "box_format": "xyxy", "box_unit": "pixel"}
    rows = save(tmp_path, "b.jsonl", [{"image": "1.jpg", **fine}, {"image": "1.jpg", **whole}])
    assert told(boxes=rows) == f"{rows}, row 2{problem}"
    entries = save(tmp_path, "b.json", {"0.jpg": fine, "1.jpg": whole})
    assert told(boxes=entries) == f"{entries}, 1.jpg{problem}"


def test_llava_s_boxes_are_fractions_or_an_error(tmp_path: Path) -> None:
    row = {"image": "1.jpg", "captions": ["x"], "instances": [{"category": "cup", "bbox": [0, 0, 1.2, 0.5]}]}
    contexts = read_contexts(contexts=save(tmp_path, "a.jsonl", [row]))
    assert contexts[0].boxes == (Box("cup", (0, 0, 1.0, 0.5)),)
    assert contexts.report.clipped_boxes == 1
    row["instances"][0]["bbox"] = [10, 20, 212, 300]  # type: ignore[index]
    file = save(tmp_path, "a.jsonl", [row])
    problem = "bbox [10, 20, 212, 300] cannot be fractions of an image: a corner is 300; are they pixels?"
    assert told(contexts=file) == f"{file}, row 1, box 1: {problem}"


TALK = [{"id": "1", "image": "1.jpg", "conversations": []}]
LLAVA = [{"image": "1.jpg", "captions": ["x"], "instances": []}]
OWN = {"info.jpg": {"info": {"boxes": 1}, "images": [], "box_unit": "pixel", "boxes": []}}


def annotations(**entry: Any) -> dict[str, Any]:
    return captions(annotations=[{"id": 1, "image_id": 7} | entry])


WANT_CAPTIONS = "COCO captions (captions_train2017.json) or rows of image and caption"
WANT_INSTANCES = "COCO instances (instances_train2017.json)"
WANT_BOXES = "boxes by image"
WANT_CONTEXTS = "rows of image, captions and instances"


@pytest.mark.parametrize(
    ("field", "content", "message"),
    [
        ("instances", captions(), f"COCO captions; it should hold {WANT_INSTANCES}; give it as data.captions"),
        ("captions", instances(), f"COCO instances; it should hold {WANT_CAPTIONS}; give it as data.instances"),
        ("contexts", instances(), f"COCO instances; it should hold {WANT_CONTEXTS}; give it as data.instances"),
        ("boxes", instances(), f"COCO instances; it should hold {WANT_BOXES}; give it as data.instances"),
        (
            "captions",
            annotations(keypoints=[], bbox=[], category_id=1),
            f"COCO keypoints, which have people alone; it should hold {WANT_CAPTIONS}",
        ),
        (
            "instances",
            annotations(keypoints=[], bbox=[], category_id=1),
            f"COCO keypoints, which have people alone; it should hold {WANT_INSTANCES}",
        ),
        (
            "instances",
            annotations(segments_info=[]),
            f"COCO panoptic segments, which have no boxes of single objects; it should hold {WANT_INSTANCES}",
        ),
        (
            "instances",
            annotations(question="?"),
            f"annotations that are neither captions nor boxes; it should hold {WANT_INSTANCES}",
        ),
        (
            "captions",
            {"images": IMAGES, "categories": CATEGORIES},
            f"COCO's list of images without any annotation; it should hold {WANT_CAPTIONS}",
        ),
        (
            "instances",
            [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}],
            f"COCO results of a detector or captioner, which do not name their images; it should hold {WANT_INSTANCES}",
        ),
        ("contexts", TALK, f"conversations, which are what is made here; it should hold {WANT_CONTEXTS}"),
        (
            "captions",
            LLAVA,
            f"rows of image, captions and instances; it should hold {WANT_CAPTIONS}; give it as data.contexts",
        ),
        ("captions", OWN, f"boxes by image; it should hold {WANT_CAPTIONS}; give it as data.boxes"),
        (
            "contexts",
            [{"image": "1.jpg", "caption": "x"}],
            f"rows of image and caption; it should hold {WANT_CONTEXTS}; give it as data.captions",
        ),
    ],
)
def test_a_file_of_another_kind_is_told(tmp_path: Path, field: str, content: Any, message: str) -> None:
    file = save(tmp_path, "a.json", content)
    given: dict[str, Any] = {field: file}
    assert told(**given, where="data") == f"data.{field}: {file} holds {message}"


def test_coco_s_stuff_is_no_objects(tmp_path: Path) -> None:
    kinds = [
        *CATEGORIES,
        {"id": 92, "name": "banner", "supercategory": "textile"},
        {"id": 98, "name": "cabinet", "supercategory": "furniture-stuff"},
    ]
    file = save(tmp_path, "stuff.json", instances(categories=kinds))
    assert told(instances=file) == (
        f"{file}: it holds COCO stuff, which are regions such as sky; give instances_train2017.json"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", "it holds no rows; it should hold "),
        ("a.jsonl", "", "it holds no rows; it should hold "),
        ("a.json", "[1]", "it holds rows that are int; it should hold "),
        ("a.json", {"info": {}, "x": []}, "it holds an object with 'x' and no boxes; it should hold "),
        ("a.json", "{}", "it holds an object with '' and no boxes; it should hold "),
        ("a.csv", "image,text\n1.jpg,A dog\n", "its rows have image, text; it should hold "),
        (
            "a.json",
            '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"caption": "x", "im',
            "not JSON: the file ends within a value: it is cut off",
        ),
        ("a.json", '{"file": "1.jpg"}\n{"file": "2.jpg"}\n', ": its rows have file; it should hold "),
        ("a.json", '{"images": [NaN]}', "not JSON: lexical error: invalid char in json text."),
        ("a.json", "", "line 1: not JSON: Expecting value"),
    ],
)
def test_broken_and_unknown_files_are_told(tmp_path: Path, name: str, content: Any, message: str) -> None:
    file = save(tmp_path, name, content)
    assert message in told(captions=file)
    assert told(captions=file).startswith(str(file))


def test_a_table_s_columns_are_named_in_the_mend(tmp_path: Path) -> None:
    file = save(tmp_path, "a.csv", "image,text\n1.jpg,A dog\n")
    assert told(captions=file, where="data") == (
        f"{file}: its rows have image, text; it should hold {WANT_CAPTIONS}; data.columns names columns"
    )
    assert told(captions=file, columns={"captoin": "text"}, where="data") == (
        "data.columns: 'captoin' is no column of captions (did you mean \"caption\"?); it names image and caption"
    )


def test_text_that_is_not_utf_8_is_told_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    text = json.dumps(captions(), ensure_ascii=False)
    file.write_bytes(text.replace("A man", "Ein Bär").encode("latin-1"))
    assert told(captions=file) == f"{file}: not UTF-8; save it as UTF-8"
    file.write_bytes(b"\xef\xbb\xbf \n" + text.encode())
    assert len(read_contexts(captions=file)) == 2


def test_a_big_file_is_streamed(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    rows = ", ".join(json.dumps({"image_id": n, "caption": "A dog. " * 10}) for n in range(3000))
    file.write_text('{"annotations": [' + rows + ", broken")
    items = json_items(file, "annotations.item")
    assert [next(items)["image_id"] for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"c\.json: not JSON: lexical error"):
        list(items)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (captions(images=[{"id": 7}]), "images, entry 1: file_name is None; a file of COCO's gives each entry one"),
        (captions(images=[5]), "images, entry 1: id is None; a file of COCO's gives each entry one"),
        (
            captions(annotations=[{"caption": "x"}]),
            "annotations, entry 1: image_id is None; a file of COCO's gives each entry one",
        ),
        (
            captions(annotations=[{"caption": "x", "image_id": 7}, {"caption": 5, "image_id": 7}]),
            "annotations, entry 2: caption is 5; it should be text",
        ),
        (instances(categories=[]), "annotations, entry 1: category_id is 18, which the file's categories do not hold"),
        (
            instances(images=[{"id": 7, "file_name": "7.jpg", "width": 640}]),
            "image 7: height is None; boxes in pixels need the image's height in pixels",
        ),
        (
            instances(annotations=[{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3]}]),
            "annotations, entry 1: bbox is [1, 2, 3]; it should be a list of four numbers",
        ),
    ],
)
def test_what_a_file_of_coco_lacks_is_told(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    file = save(tmp_path, "a.json", content)
    field = "captions" if "categories" not in content else "instances"
    assert told(**{field: file}) == f"{file}, {message}"


@pytest.mark.parametrize(
    ("rows", "field", "message"),
    [
        ([*LLAVA, {"image": "2.jpg"}], "contexts", "row 2: neither captions nor instances; it has image"),
        ([*LLAVA, 5], "contexts", "row 2: it is 5; it should be an object with named fields"),
        (
            [*LLAVA, {"captions": ["x"]}],
            "contexts",
            "row 2: the image's name is None; it should be the name of its file",
        ),
        (
            [*LLAVA, {"image": "2.jpg", "captions": [{}]}],
            "contexts",
            "row 2: captions is {}; it should be text, or a list of texts",
        ),
        (
            [{"image": "1.jpg", "caption": "x"}, {"image": "2.jpg", "text": "x"}],
            "captions",
            "row 2: no column caption; it has image, text",
        ),
    ],
)
def test_what_a_row_lacks_is_told(tmp_path: Path, rows: list[Any], field: str, message: str) -> None:
    file = save(tmp_path, "a.jsonl", rows)
    assert told(**{field: file}) == f"{file}, {message}"


def test_an_entry_without_boxes_is_told(tmp_path: Path) -> None:
    fine = {"boxes": [], "box_format": "xyxy", "box_unit": "pixel"}
    for entry, problem in (
        ({"box": []}, "no boxes; it has box"),
        ([], "it is []; it should be an object with a list of boxes"),
    ):
        file = save(tmp_path, "b.json", {"0.jpg": fine, "1.jpg": entry})
        assert told(boxes=file) == f"{file}, 1.jpg: {problem}"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../1.jpg", "image ../1.jpg leads out of the image folder; name it from there"),
        ("a/../../1.jpg", "image a/../../1.jpg leads out of the image folder; name it from there"),
        ("/etc/1.jpg", "image /etc/1.jpg leads out of the image folder; name it from there"),
        ("a\\..\\1.jpg", "image a\\..\\1.jpg leads out of the image folder; name it from there"),
        ("C:\\1.jpg", "image C:\\1.jpg leads out of the image folder; name it from there"),
        ("http://x/1.jpg", "image http://x/1.jpg is a URL; give the name of its file in the image folder"),
        ("data:image/png;x", "image data:image/png;x is a URL; give the name of its file in the image folder"),
        ("a\x00.jpg", "the image's name is 'a\\x00.jpg'; it should be the name of its file"),
        ("a\n.jpg", "the image's name is 'a\\n.jpg'; it should be the name of its file"),
        (" ", "the image's name is ' '; it should be the name of its file"),
        ("", "the image's name is ''; it should be the name of its file"),
        (5, "the image's name is 5; it should be the name of its file"),
        (["a.jpg"], "the image's name is ['a.jpg']; it should be the name of its file"),
    ],
)
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: Any, problem: str) -> None:
    file = save(tmp_path, "a.jsonl", [{"image": "a..b/1.jpg", "captions": ["x"]}, {"image": name, "captions": ["x"]}])
    assert told(contexts=file) == f"{file}, row 2: {problem}"


def test_nothing_given_and_nothing_left_are_told(tmp_path: Path) -> None:
    assert told(where="data") == "data.captions, data.instances, data.boxes, data.contexts: none is given; name a file"
    assert (
        told(boxes=tmp_path / "x.json")
        == f"boxes: {tmp_path / 'x.json'} is missing; it should be a file such as chat.json"
    )
    file = save(tmp_path, "a.jsonl", [{"image": "1.jpg", "captions": ["", " "]}])
    assert told(contexts=file) == (
        f"no image with a context is left of {file} (images: 0, captions: 0, boxes: 0, empty captions: 2, "
        "images without anything: 1); look at what was dropped"
    )
