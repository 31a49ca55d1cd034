"""An override that names another source of contexts replaces the recipe's."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_llava.recipe import load_generate_recipe

ALL = {"captions": "c.json", "instances": "i.json", "images": "photos", "box_unit": "pixel"}
HEAD = "output_dir: out\nteacher: {backend: demo}\ncontexts: "
COCO = "{captions: c.json, instances: i.json, images: photos, box_unit: pixel}"


@pytest.mark.parametrize(
    ("section", "overrides", "left", "removed"),
    [
        (COCO, ["contexts=x.jsonl"], {"contexts": "x.jsonl"}, "captions,instances,images,box_unit"),
        (COCO, ["contexts=x.jsonl", "images=p"], {"contexts": "x.jsonl", "images": "p"}, "captions,instances,box_unit"),
        (
            COCO,
            ["boxes=b.json", "captions=d.csv"],
            {"boxes": "b.json", "captions": "d.csv"},
            "instances,images,box_unit",
        ),
        (COCO, ["captions=d.csv"], ALL | {"captions": "d.csv"}, None),
        (COCO, ["contexts=null"], ALL, None),
        ("{captions: c.json}", ["instances=i.json"], {"captions": "c.json", "instances": "i.json"}, None),
        ("{contexts: demo}", ["captions=d.csv"], {"captions": "d.csv"}, "contexts"),
        ("{contexts: a.jsonl, images: p}", ["contexts=b.jsonl"], {"contexts": "b.jsonl", "images": "p"}, None),
    ],
)
def test_another_source_replaces_the_former_ones(
    section: str,
    overrides: list[str],
    left: dict[str, str],
    removed: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(HEAD + section)
    recipe = load_generate_recipe(file, [f"contexts.{each}" for each in overrides])
    assert recipe.contexts.model_dump(exclude_defaults=True) == left
    shown = capsys.readouterr().err
    key = overrides[0].partition("=")[0]
    listed = ", ".join(f"contexts.{each}" for each in (removed or "").split(","))
    end = "; to keep one, give it on the command line too\n"
    assert shown == (f"note: contexts.{key} replaces the recipe's {listed}{end}" if removed else "")
