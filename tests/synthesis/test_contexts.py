"""Reading contexts from every kind of file: joining, cleaning, clipping and counting."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lora_llava.synthesis.contexts.context import Box, Context, write_context
from lora_llava.synthesis.contexts.context_builder import ContextBuilder, ContextReport, clean_text
from lora_llava.synthesis.contexts.reading_contexts import read_contexts
from tests.synthesis.context_files import CATEGORIES, IMAGES, SEVEN, THREE, captions, error_of, instances, save

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_contexts" / "captions_boxes_20.jsonl"


@pytest.mark.skipif(not REAL.exists(), reason="the twenty COCO contexts are not in this repository")
def test_contexts_of_llava_appear_in_the_prompt_as_in_the_file() -> None:
    contexts = read_contexts(contexts=REAL)
    rows = {row["image"]: (row, line) for line in REAL.read_text().splitlines() for row in [json.loads(line)]}
    assert [context.image for context in contexts] == sorted(rows)
    assert str(contexts.report) == "images: 20, captions: 100, boxes: 109, captions alone: 1"
    for context in contexts:
        row, line = rows[context.image]
        text = write_context(context)
        boxes = [f"{each['category']}: {each['bbox']}" for each in row["instances"]]
        assert text == "\n\n".join("\n".join(part) for part in (row["captions"], boxes) if part)
        assert all(box.partition(": ")[2] in line for box in boxes)


def test_numbers_in_boxes_of_llava_are_kept(tmp_path: Path) -> None:
    line = '{"image": "1.jpg", "instances": [{"category": "cup", "bbox": [0, 0.0, 0.12345, 1]}]}'
    context = read_contexts(contexts=save(tmp_path, "a.jsonl", line))[0]
    assert repr(context.boxes[0].corners) == "(0, 0.0, 0.12345, 1)"
    assert write_context(context) == "cup: [0, 0.0, 0.123, 1]"


def test_the_two_files_of_coco_are_joined(tmp_path: Path) -> None:
    contexts = read_contexts(
        captions=save(tmp_path, "c.json", captions()), instances=save(tmp_path, "i.json", instances())
    )
    assert list(contexts) == [THREE, SEVEN]
    assert contexts.report == ContextReport(
        images=2,
        captions=3,
        boxes=3,
        empty_captions=1,
        repeated_captions=1,
        crowd_regions=1,
        clipped_boxes=1,
        dropped_boxes=2,
        unlisted_annotations=2,
        images_without_anything=1,
    )
    assert str(contexts.report) == (
        "images: 2, captions: 3, boxes: 3, empty captions: 1, repeated captions: 1, crowd regions: 1, "
        "clipped boxes: 1, dropped boxes: 2, unlisted annotations: 2, images without anything: 1"
    )


@given(seed=st.integers(0, 1000), compact=st.booleans())
def test_the_order_within_coco_files_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, seed: int, compact: bool
) -> None:
    folder, order = tmp_path_factory.mktemp("coco"), random.Random(seed)
    content_of = instances()
    keys = order.sample(list(content_of), 3)
    images = order.sample(IMAGES, 3)
    content = {key: images if key == "images" else content_of[key] for key in keys}
    file = save(folder, "i.json", json.dumps(content, indent=None if compact else 2))
    assert list(read_contexts(instances=file)) == [
        Context(THREE.image, (), THREE.boxes),
        Context(SEVEN.image, (), SEVEN.boxes),
    ]


def test_either_file_of_coco_suffices(tmp_path: Path) -> None:
    only = read_contexts(captions=save(tmp_path, "c.json", captions()))
    assert [(x.image, x.captions, x.boxes) for x in only] == [
        ("000000000003.jpg", ("A man",), ()),
        ("000000000007.jpg", ("A dog.", "Two dogs"), ()),
    ]
    assert (only.report.captions_alone, only.report.boxes_alone, only.report.boxes) == (2, 0, 0)
    boxes = read_contexts(instances=save(tmp_path, "i.json", instances()))
    assert (boxes.report.captions_alone, boxes.report.boxes_alone, boxes.report.captions) == (0, 2, 0)


def test_contexts_are_a_sequence(tmp_path: Path) -> None:
    contexts = read_contexts(
        captions=save(tmp_path, "c.json", captions()), instances=save(tmp_path, "i.json", instances())
    )
    assert len(contexts) == 2
    assert contexts[-1] == SEVEN
    assert contexts[:1] == [THREE]
    assert contexts.images == ["000000000003.jpg", "000000000007.jpg"]
    with pytest.raises(IndexError):
        contexts[2]


@given(
    box=st.tuples(*[st.floats(-1e4, 1e4)] * 2, *[st.floats(0, 1e4)] * 2),
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
)
@example(box=(-0.0, -0.0, 5.0, 5.0), size=(10, 10))
@example(box=(9.9999, 0.0, 1.0, 1.0), size=(10, 10))
def test_boxes_in_pixels_are_clipped_to_the_image(
    tmp_path_factory: pytest.TempPathFactory, box: tuple[float, ...], size: tuple[int, int]
) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}],
        "categories": CATEGORIES,
        "annotations": [{"image_id": 1, "category_id": 18, "bbox": box}],
    }
    file = save(tmp_path_factory.mktemp("box"), "i.json", content)
    x, y, width, height = box
    corners_before = (x / size[0], y / size[1], (x + width) / size[0], (y + height) / size[1])
    inside = tuple(min(max(corner, 0), 1) for corner in corners_before)
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        assert "dropped boxes: 1, " in error_of(instances=file)
        return
    contexts = read_contexts(instances=file)
    corners = contexts[0].boxes[0].corners
    assert corners == tuple(round(corner, 3) for corner in inside)
    assert "-" not in repr(corners)
    assert contexts.report.clipped_boxes == any(corner < -0.0005 or corner > 1.0005 for corner in corners_before)


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([290.5, -5.0, 100.0, 100.0], "reaches out of the image"),
        ([300.0, 0.0, 10.0, 10.0], "has no area within the image"),
    ],
)
def test_bad_boxes_can_be_errors(tmp_path: Path, box: list[float], problem: str) -> None:
    rows = [{"image_id": 3, "category_id": 18, "bbox": box}]
    file = save(tmp_path, "i.json", instances(annotations=rows))
    message = error_of(instances=file, on_bad_box="error")
    assert message.startswith(f"{file}, image 3: box 'dog' [")
    assert message.endswith(f"of 000000000003.jpg {problem}; fix it, or set on_bad_box to clip")
    rows[0]["bbox"] = [0.0, 0.0, 300.1, 300.0]  # a rounding
    contexts = read_contexts(instances=save(tmp_path, "i.json", instances(annotations=rows)), on_bad_box="error")
    assert contexts[0].boxes == (Box("dog", (0.0, 0.0, 1.0, 1.0)),)


@given(st.text())
@example("\ud800")
@example(" a \u2028 b\x00\x1f\tc\u3000\x85")
def test_a_clean_text_is_one_line(text: str) -> None:
    clean = clean_text(text)
    assert clean_text(clean) == clean
    assert clean == " ".join(clean.split())
    assert not any(ord(sign) < 32 or 127 <= ord(sign) < 160 or 0xD800 <= ord(sign) < 0xE000 for sign in clean)
    if text.isprintable():
        assert clean.replace(" ", "") == text.replace(" ", "")


def test_texts_are_cleaned() -> None:
    assert clean_text(" A\tdo\x00g \n on\u2028a\u00a0mat \x7f. ") == "A dog on a mat ."
    assert clean_text("Größe 🐕‍🦺 \ud800x") == "Größe 🐕‍🦺 x"


ROWS = [("b.jpg", "Two cats"), ("a.jpg", 'A cat, "black"'), ("b.jpg", ""), ("b.jpg", "Two  cats"), ("b.jpg", "Cats")]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet", "lines.json"])
@pytest.mark.parametrize("names", [{}, {"image": "file", "caption": "text"}])
def test_tables_of_captions(tmp_path: Path, suffix: str, names: dict[str, str]) -> None:
    columns = [names.get("image", "image"), names.get("caption", "caption")]
    rows = [dict(zip(columns, row, strict=True)) for row in ROWS]
    file = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif suffix.endswith("json") or suffix == ".jsonl":
        file.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    else:
        sign = "," if suffix == ".csv" else "\t"
        quoted = [columns, *([f'"{x.replace(chr(34), chr(34) * 2)}"' for x in row] for row in ROWS)]
        file.write_text("\n".join(map(sign.join, quoted)))
    contexts = read_contexts(captions=file, columns=names)
    assert list(contexts) == [Context("a.jpg", ('A cat, "black"',)), Context("b.jpg", ("Two cats", "Cats"))]
    assert contexts.report == ContextReport(2, 3, 0, captions_alone=2, empty_captions=1, repeated_captions=1)


def test_a_row_of_a_table_may_have_several_captions_or_none(tmp_path: Path) -> None:
    rows = [
        {"image": {"path": "a.jpg"}, "caption": ["One", "Two", None]},
        {"image": "b.jpg", "caption": 5},
        {"image": "c.jpg", "caption": float("nan")},
    ]
    contexts = read_contexts(captions=save(tmp_path, "t.json", rows))
    assert list(contexts) == [Context("a.jpg", ("One", "Two")), Context("b.jpg", ("5",))]
    assert contexts.report == ContextReport(2, 3, 0, 2, empty_captions=2, images_without_anything=1)


@given(st.permutations(range(5)))
def test_contexts_are_sorted_by_image_name(tmp_path_factory: pytest.TempPathFactory, order: list[int]) -> None:
    rows = [{"image": f"{n}/ä{n}.jpg", "captions": [f"number {n}"]} for n in order]
    contexts = read_contexts(contexts=save(tmp_path_factory.mktemp("rows"), "a.jsonl", rows))
    assert list(contexts) == [Context(f"{n}/ä{n}.jpg", (f"number {n}",)) for n in range(5)]


DOG = Context("1.jpg", (), (Box("dog", (0.1, 0.25, 0.4, 0.75)),))


@pytest.mark.parametrize(
    ("form", "unit", "bbox"),
    [
        ("xywh", "pixel", [64, 120, 192, 240]),
        ("xyxy", "pixel", [64, 120, 256, 360.2]),
        ("xyxy", "fraction", [0.1, 0.25, 0.4, 0.75]),
        ("xywh", "fraction", [0.1, 0.25, 0.30000000000000004, 0.5]),
    ],
)
@pytest.mark.parametrize("shape", ["entries", "rows", "lines"])
@pytest.mark.parametrize("by_entry", [True, False])
def test_own_boxes(tmp_path: Path, form: Any, unit: Any, bbox: list[float], shape: str, by_entry: bool) -> None:
    entry: dict[str, Any] = {"width": 640, "height": 480, "boxes": [{"label": " dog ", "bbox": bbox}]}
    given: dict[str, Any] = {"box_format": form, "box_unit": unit}
    other = {
        "box_format": "xyxy" if form == "xywh" else "xywh",
        "box_unit": "fraction" if unit == "pixel" else "pixel",
    }
    if by_entry:  # an entry takes precedence over the arguments
        entry, given = entry | given, other
    if shape == "entries":
        file = save(tmp_path, "b.json", {"1.jpg": entry})
    else:
        file = save(tmp_path, "b.json" if shape == "rows" else "b.jsonl", [{"image": "1.jpg", **entry}])
    assert list(read_contexts(boxes=file, **given)) == [DOG]


def test_all_files_are_joined_by_image_and_may_be_partial(tmp_path: Path) -> None:
    table = save(tmp_path, "t.csv", "image,caption\n000000000007.jpg,Dogs\nz.png,Alone\n")
    rows = [
        {"image": "000000000003.jpg", "captions": ["A man", "Him"]},
        {"image": "y.png", "instances": [{"label": "cup", "bbox": [0.1, 0.1, 0.2, 0.2]}]},
    ]
    contexts = read_contexts(
        captions=table, instances=save(tmp_path, "i.json", instances()), contexts=save(tmp_path, "c.jsonl", rows)
    )
    assert list(contexts) == [
        Context(THREE.image, ("A man", "Him"), THREE.boxes),
        Context(SEVEN.image, ("Dogs",), SEVEN.boxes),
        Context("y.png", (), (Box("cup", (0.1, 0.1, 0.2, 0.2)),)),
        Context("z.png", ("Alone",)),
    ]
    assert (contexts.report.captions_alone, contexts.report.boxes_alone) == (1, 1)


def test_names_of_both_coco_releases_are_one_image(tmp_path: Path) -> None:
    old = [image | {"file_name": f"COCO_train2014_{image['file_name']}"} for image in IMAGES]
    contexts = read_contexts(
        captions=save(tmp_path, "c.json", captions(images=old)), instances=save(tmp_path, "i.json", instances())
    )
    assert [x.image for x in contexts] == ["COCO_train2014_000000000003.jpg", "COCO_train2014_000000000007.jpg"]
    assert [(x.captions, x.boxes) for x in contexts] == [(x.captions, x.boxes) for x in (THREE, SEVEN)]


def test_an_image_has_one_set_of_boxes(tmp_path: Path) -> None:
    one = {"image": "1.jpg", "captions": ["x"], "instances": [{"category": "cup", "bbox": [0.1, 0.2, 0.3, 0.4]}] * 2}
    contexts = read_contexts(contexts=save(tmp_path, "a.jsonl", [one, one]))
    assert [len(x.boxes) for x in contexts] == [2]
    assert (contexts.report.boxes, contexts.report.repeated_boxes, contexts.report.repeated_captions) == (2, 2, 1)
    other = one | {"instances": [{"category": "cup", "bbox": [0.1, 0.2, 0.3, 0.5]}]}
    file = save(tmp_path, "a.jsonl", [one, other])
    assert error_of(contexts=file) == (
        f"{file}, row 2: 1.jpg already has other boxes, from an earlier row or file; give its boxes once"
    )


def test_missing_images_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "train2014").mkdir(parents=True)
    (folder / "train2014" / "COCO_train2014_000000000007.jpg").touch()
    (folder / "1.jpg").touch()
    (folder / "2.jpg").mkdir()
    names = ["000000000007.jpg", "1.jpg", "2.jpg", "3.jpg", "x" * 300]
    file = save(tmp_path, "a.jsonl", [{"image": name, "captions": ["a", "b"]} for name in names])
    contexts = read_contexts(contexts=file, images=folder, missing_image="drop")
    assert contexts.images == ["000000000007.jpg", "1.jpg"]
    assert contexts.report == ContextReport(2, 4, 0, captions_alone=2, missing_images=3)
    assert error_of(contexts=file, images=folder, where="data") == (
        f"data.images: image 2.jpg is not in {folder}; add it, or set data.missing_image to drop"
    )
    assert error_of(contexts=file, images=tmp_path / "no", where="data") == (
        f"data.images: the folder {tmp_path / 'no'} does not exist; name the root folder of the images"
    )
    (tmp_path / "secret.jpg").touch()
    (folder / "3.jpg").symlink_to(tmp_path / "secret.jpg")
    assert error_of(contexts=file, images=folder, missing_image="drop") == (
        f"image 3.jpg is outside {folder.resolve()}: 3.jpg is a link that leads out of it"
    )


def test_labels_and_captions_survive_storage_as_bytes() -> None:
    builder = ContextBuilder()
    name = builder.add_image('a "b".jpg', "here")
    builder.add_captions(name, ['He said: "a","b"\\', 'a","b', "ünï 🐕"])
    builder.add_boxes(name, [('tv "set",', (0.1, 0.2, 0.30000000000000004, 0.4))] * 2, "here", rounded=False)
    found = builder.finish(lambda name: True)
    assert json.loads(found['a "b".jpg']) == [
        ['He said: "a","b"\\', 'a","b', "ünï 🐕"],
        [['tv "set",', 0.1, 0.2, 0.30000000000000004, 0.4]] * 2,
    ]
    assert builder.report == ContextReport(1, 3, 2)
