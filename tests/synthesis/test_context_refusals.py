"""Invalid contexts: errors that name the file, the row and the value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.core.errors import UserError
from lora_llava.synthesis.contexts.coco_contexts import json_items
from lora_llava.synthesis.contexts.context import Box
from lora_llava.synthesis.contexts.reading_contexts import read_contexts
from tests.synthesis.context_files import CATEGORIES, IMAGES, captions, error_of, instances, save


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"box_format": "cxcywh"}, ": box_format is 'cxcywh'; set it to xyxy or xywh, or leave it out"),
        ({"box_unit": None}, ": box_unit is None; set it to fraction or pixel, or leave it out"),
        ({"boxes": 3, "box_format": "xyxy", "box_unit": "pixel"}, ": boxes is 3; it must be a list"),
        ({}, ", box 1: width is None; give the image's width in pixels, which boxes in pixels need"),
        (
            {"width": 640, "height": 0},
            ", box 1: height is 0; give the image's height in pixels, which boxes in pixels need",
        ),
        ({"box": [5, 5, 4, 9]}, ", box 1: bbox [5, 5, 4, 9] is not in xyxy: its second corner comes before its first"),
        ({"box": [5, 5, 9, 4]}, ", box 1: bbox [5, 5, 9, 4] is not in xyxy: its second corner comes before its first"),
        (
            {"box": [5, 5, -4, 9], "box_format": "xywh"},
            ", box 1: bbox [5, 5, -4, 9] is not in xywh: a width or height is below 0",
        ),
        (
            {"box": [0.1, 0.2, 0.3, 0.4], "width": 640, "height": 480},
            ", box 1: bbox [0.1, 0.2, 0.3, 0.4] is not in pixels: no number is over 1; "
            "if they are fractions, set box_unit to fraction",
        ),
        (
            {"box": [1, 2, 3000, 4], "width": 640, "height": 480},
            ", box 1: bbox [1, 2, 3000, 4] is not in pixels of an image of 640 x 480: it lies far outside the image",
        ),
        (
            {"box": [1, 2, 30, 40], "box_unit": "fraction"},
            ", box 1: bbox [1, 2, 30, 40] is not in fractions of an image: a corner is 40; "
            "give pixels as boxes with box_unit pixel",
        ),
        ({"box": [1, 2, 3]}, ", box 1: bbox is [1, 2, 3]; it must be a list of four numbers"),
        ({"box": [1, 2, 3, True]}, ", box 1: bbox is [1, 2, 3, True]; it must be a list of four numbers"),
        (
            {"box": [1, 2, 3, 10**301]},
            f", box 1: bbox is {[1, 2, 3, 10**301]!r:.80}; it must be a list of four numbers",
        ),
        ({"box": "1 2 3 4"}, ", box 1: bbox is '1 2 3 4'; it must be a list of four numbers"),
        (
            {"boxes": [{"bbox": [1, 2, 3, 4]}], "box_format": "xyxy", "box_unit": "pixel"},
            ", box 1: it is {'bbox': [1, 2, 3, 4]}; it must have a label or category, and a bbox",
        ),
        ({"label": " \x00", "width": 640, "height": 480}, ": a box has an empty label; name its object"),
    ],
)
def test_invalid_own_boxes_are_errors(tmp_path: Path, entry: dict[str, Any], problem: str) -> None:
    plain = "boxes" in entry or entry.keys() == {"box_format"}
    box = {"label": entry.pop("label", "dog"), "bbox": entry.pop("box", [1, 2, 3, 4])}
    full = {"boxes": [box]} | ({} if plain else {"box_format": "xyxy", "box_unit": "pixel"}) | entry
    fine = {"boxes": [], "box_format": "xyxy", "box_unit": "pixel"}
    rows = save(tmp_path, "b.jsonl", [{"image": "1.jpg", **fine}, {"image": "1.jpg", **full}])
    assert error_of(boxes=rows) == f"{rows}, row 2{problem}"
    entries = save(tmp_path, "b.json", {"0.jpg": fine, "1.jpg": full})
    assert error_of(boxes=entries) == f"{entries}, 1.jpg{problem}"


def test_boxes_of_llava_must_be_fractions(tmp_path: Path) -> None:
    row = {"image": "1.jpg", "captions": ["x"], "instances": [{"category": "cup", "bbox": [0, 0, 1.2, 0.5]}]}
    contexts = read_contexts(contexts=save(tmp_path, "a.jsonl", [row]))
    assert contexts[0].boxes == (Box("cup", (0, 0, 1.0, 0.5)),)
    assert contexts.report.clipped_boxes == 1
    row["instances"][0]["bbox"] = [10, 20, 212, 300]  # type: ignore[index]
    file = save(tmp_path, "a.jsonl", [row])
    problem = (
        "bbox [10, 20, 212, 300] is not in fractions of an image: a corner is 300; give pixels as boxes with box_unit "
        "pixel"
    )
    assert error_of(contexts=file) == f"{file}, row 1, box 1: {problem}"


CHAT = [{"id": "1", "image": "1.jpg", "conversations": []}]
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
        ("instances", captions(), f"COCO captions; it must contain {WANT_INSTANCES}; give it as data.captions"),
        ("captions", instances(), f"COCO instances; it must contain {WANT_CAPTIONS}; give it as data.instances"),
        ("contexts", instances(), f"COCO instances; it must contain {WANT_CONTEXTS}; give it as data.instances"),
        ("boxes", instances(), f"COCO instances; it must contain {WANT_BOXES}; give it as data.instances"),
        (
            "captions",
            annotations(keypoints=[], bbox=[], category_id=1),
            f"COCO keypoints, which cover only people; it must contain {WANT_CAPTIONS}",
        ),
        (
            "instances",
            annotations(keypoints=[], bbox=[], category_id=1),
            f"COCO keypoints, which cover only people; it must contain {WANT_INSTANCES}",
        ),
        (
            "instances",
            annotations(segments_info=[]),
            f"COCO panoptic segments, which lack boxes of single objects; it must contain {WANT_INSTANCES}",
        ),
        (
            "instances",
            annotations(question="?"),
            f"annotations that are neither captions nor boxes; it must contain {WANT_INSTANCES}",
        ),
        (
            "captions",
            {"images": IMAGES, "categories": CATEGORIES},
            f"a COCO list of images without annotations; it must contain {WANT_CAPTIONS}",
        ),
        (
            "instances",
            [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}],
            "COCO results of a detector or captioner, which do not name their images; it must contain "
            f"{WANT_INSTANCES}",
        ),
        ("contexts", CHAT, f"conversations, which are the output of this verb; it must contain {WANT_CONTEXTS}"),
        (
            "captions",
            LLAVA,
            f"rows of image, captions and instances; it must contain {WANT_CAPTIONS}; give it as data.contexts",
        ),
        ("captions", OWN, f"boxes by image; it must contain {WANT_CAPTIONS}; give it as data.boxes"),
        (
            "contexts",
            [{"image": "1.jpg", "caption": "x"}],
            f"rows of image and caption; it must contain {WANT_CONTEXTS}; give it as data.captions",
        ),
    ],
)
def test_a_file_of_the_wrong_kind_is_an_error(tmp_path: Path, field: str, content: Any, message: str) -> None:
    file = save(tmp_path, "a.json", content)
    given: dict[str, Any] = {field: file}
    assert error_of(**given, where="data") == f"data.{field}: {file} contains {message}"


def test_coco_stuff_is_an_error(tmp_path: Path) -> None:
    kinds = [
        *CATEGORIES,
        {"id": 92, "name": "banner", "supercategory": "textile"},
        {"id": 98, "name": "cabinet", "supercategory": "furniture-stuff"},
    ]
    file = save(tmp_path, "stuff.json", instances(categories=kinds))
    assert error_of(instances=file) == (
        f"{file}: it contains COCO stuff, which are regions such as sky; give instances_train2017.json"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", "it contains no rows; it must contain "),
        ("a.jsonl", "", "it contains no rows; it must contain "),
        ("a.json", "[1]", "it contains rows of type int; it must contain "),
        ("a.json", {"info": {}, "x": []}, "it contains an object with 'x' and no boxes; it must contain "),
        ("a.json", "{}", "it contains an object with '' and no boxes; it must contain "),
        ("a.csv", "image,text\n1.jpg,A dog\n", "its rows have the columns image, text; it must contain "),
        (
            "a.json",
            '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"caption": "x", "im',
            "not JSON: the file ends within a value; it seems truncated",
        ),
        ("a.json", '{"file": "1.jpg"}\n{"file": "2.jpg"}\n', ": its rows have the columns file; it must contain "),
        ("a.json", '{"images": [NaN]}', "not JSON: a value is not a number, text, list or object"),
        ("a.json", "", "line 1: not JSON: Expecting value"),
        ("a.json", '{"images": []} x', "not JSON: more text follows the end of the object"),
        ("a.json", '{"images": []} [', "not JSON: more text follows the end of the object"),
        ("a.json", '{"images": [], "images": []}', "the key 'images' appears twice in one object; keep one"),
        ("a.json", '{"images": ["\\ud800"]}', "it contains text that is not Unicode; save it as UTF-8"),
        ("a.json", '{"images": ' + "[" * 100_000, "not readable as JSON: it is nested too deeply"),
        ("a.json", '{"x": ' + "9" * 5000 + "}", "Exceeds the limit (4300 digits) for integer string conversion"),
    ],
)
def test_broken_and_unknown_files_are_errors(tmp_path: Path, name: str, content: Any, message: str) -> None:
    file = save(tmp_path, name, content)
    assert message in error_of(captions=file)
    assert error_of(captions=file).startswith(str(file))


def test_errors_of_tables_name_the_columns(tmp_path: Path) -> None:
    file = save(tmp_path, "a.csv", "image,text\n1.jpg,A dog\n")
    assert error_of(captions=file, where="data") == (
        f"{file}: its rows have the columns image, text; it must contain {WANT_CAPTIONS}; data.columns renames columns"
    )
    assert error_of(captions=file, columns={"captoin": "text"}, where="data") == (
        "data.columns: 'captoin' is not a known column (did you mean \"caption\"?); map only image and caption"
    )


def test_files_must_be_utf_8_and_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    text = json.dumps(captions(), ensure_ascii=False)
    file.write_bytes(text.replace("A man", "Ein Bär").encode("latin-1"))
    assert error_of(captions=file) == f"{file}: not UTF-8; save it as UTF-8"
    file.write_bytes(b"\xef\xbb\xbf \n" + text.encode())
    assert len(read_contexts(captions=file)) == 2


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_rows_in_a_json_file_may_have_another_encoding(tmp_path: Path, encoding: str) -> None:
    rows = [{"caption": "Ein Bär", "image": "1.jpg"}, {"caption": "Ein Hund", "image": "2.jpg"}]
    file = tmp_path / "c.json"
    for content in (json.dumps(rows, ensure_ascii=False), "\n".join(json.dumps(x, ensure_ascii=False) for x in rows)):
        file.write_bytes(content.encode(encoding))
        assert [context.captions for context in read_contexts(captions=file)] == [("Ein Bär",), ("Ein Hund",)]


def test_a_big_file_is_streamed(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    rows = ", ".join(json.dumps({"image_id": n, "caption": "A dog. " * 10}) for n in range(3000))
    file.write_text('{"annotations": [' + rows + ", broken")
    items = json_items(file, "annotations")
    assert [next(items)["image_id"] for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"c\.json: not JSON: a value is not a number"):
        list(items)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (captions(images=[{"id": 7}]), "images, entry 1: file_name is None; every entry of a COCO file needs it"),
        (captions(images=[5]), "images, entry 1: id is None; every entry of a COCO file needs it"),
        (
            captions(annotations=[{"caption": "x"}]),
            "annotations, entry 1: image_id is None; every entry of a COCO file needs it",
        ),
        (
            captions(annotations=[{"caption": "x", "image_id": 7}, {"caption": 5, "image_id": 7}]),
            "annotations, entry 2: caption is 5; it must be text",
        ),
        (instances(categories=[]), "annotations, entry 1: category_id is 18, which is not among the file's categories"),
        (
            instances(images=[{"id": 7, "file_name": "7.jpg", "width": 640}]),
            "image 7: height is None; give the image's height in pixels, which boxes in pixels need",
        ),
        (
            instances(annotations=[{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3]}]),
            "annotations, entry 1: bbox is [1, 2, 3]; it must be a list of four numbers",
        ),
    ],
)
def test_missing_values_in_coco_files_are_errors(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    file = save(tmp_path, "a.json", content)
    field = "captions" if "categories" not in content else "instances"
    assert error_of(**{field: file}) == f"{file}, {message}"


@pytest.mark.parametrize(
    ("rows", "field", "message"),
    [
        ([*LLAVA, {"image": "2.jpg"}], "contexts", "row 2: captions and instances are both missing; it has image"),
        ([*LLAVA, 5], "contexts", "row 2: it is 5; it must be an object with named fields"),
        (
            [*LLAVA, {"captions": ["x"]}],
            "contexts",
            "row 2: the image's name is None; it must be a file name",
        ),
        (
            [*LLAVA, {"image": "2.jpg", "captions": [{}]}],
            "contexts",
            "row 2: captions is {}; it must be text, or a list of texts",
        ),
        (
            [{"image": "1.jpg", "caption": "x"}, {"image": "2.jpg", "text": "x"}],
            "captions",
            "row 2: the column caption is missing; it has image, text",
        ),
    ],
)
def test_missing_values_in_rows_are_errors(tmp_path: Path, rows: list[Any], field: str, message: str) -> None:
    file = save(tmp_path, "a.jsonl", rows)
    assert error_of(**{field: file}) == f"{file}, {message}"


def test_an_entry_without_boxes_is_an_error(tmp_path: Path) -> None:
    fine = {"boxes": [], "box_format": "xyxy", "box_unit": "pixel"}
    for entry, problem in (
        ({"box": []}, "boxes is missing; it has box"),
        ([], "it is []; it must be an object with a list of boxes"),
    ):
        file = save(tmp_path, "b.json", {"0.jpg": fine, "1.jpg": entry})
        assert error_of(boxes=file) == f"{file}, 1.jpg: {problem}"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../1.jpg", "image ../1.jpg leads out of the image folder; give its path relative to that folder"),
        ("a/../../1.jpg", "image a/../../1.jpg leads out of the image folder; give its path relative to that folder"),
        ("/etc/1.jpg", "image /etc/1.jpg leads out of the image folder; give its path relative to that folder"),
        ("a\\..\\1.jpg", "image a\\..\\1.jpg leads out of the image folder; give its path relative to that folder"),
        ("C:\\1.jpg", "image C:\\1.jpg leads out of the image folder; give its path relative to that folder"),
        ("http://x/1.jpg", "image http://x/1.jpg is a URL; give the name of its file in the image folder"),
        ("data:image/png;x", "image data:image/png;x is a URL; give the name of its file in the image folder"),
        ("a\x00.jpg", "the image's name is 'a\\x00.jpg'; it must be a file name"),
        ("a\n.jpg", "the image's name is 'a\\n.jpg'; it must be a file name"),
        (" ", "the image's name is ' '; it must be a file name"),
        ("", "the image's name is ''; it must be a file name"),
        (5, "the image's name is 5; it must be a file name"),
        (["a.jpg"], "the image's name is ['a.jpg']; it must be a file name"),
    ],
)
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: Any, problem: str) -> None:
    file = save(tmp_path, "a.jsonl", [{"image": "a..b/1.jpg", "captions": ["x"]}, {"image": name, "captions": ["x"]}])
    assert error_of(contexts=file) == f"{file}, row 2: {problem}"


def test_no_file_and_no_context_left_are_errors(tmp_path: Path) -> None:
    assert (
        error_of(where="data")
        == "data.captions, data.instances, data.boxes, data.contexts: no file is given; set one of them"
    )
    assert (
        error_of(boxes=tmp_path / "x.json")
        == f"boxes: {tmp_path / 'x.json'} is missing; it should be a file such as chat.json"
    )
    file = save(tmp_path, "a.jsonl", [{"image": "1.jpg", "captions": ["", " "]}])
    assert error_of(contexts=file) == (
        f"{file}: no image with a context is left (images: 0, captions: 0, boxes: 0, empty captions: 2, "
        "images without anything: 1); check why they were dropped"
    )
