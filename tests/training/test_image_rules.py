"""Images as people have them, through the verbs: links, names and transparency mean the same in all of them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from lora_llava.commands.main import main
from lora_llava.data.tokens import Stop
from lora_llava.evaluation.run_report import rebuild_report
from lora_llava.inference.chat import Chat, open_images, run_line
from lora_llava.inference.open_model import background_of
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import Speaker
from lora_llava.inference.web.page import _opened
from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe import load_recipe
from lora_llava.recipe.io import check_recipe
from lora_llava.training.finetune import finetune
from tests.own_rows import asked, drawn, quiet, written


@pytest.fixture
def content(stage2_content: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    stage2_content["data"] = {"format": "conversations", "path": str(tmp_path / "rows.json"), "max_length": 400}
    stage2_content.pop("evaluation", None)
    return stage2_content


def test_init_names_links_that_lead_out_and_follows_them_if_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn(tmp_path / "elsewhere", 6)
    folder = tmp_path / "mine"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "coco").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    lines = [f"coco/{number}.png,Is it {number}?,Yes" for number in range(6)]
    (folder / "q.csv").write_text("\n".join(["image,question,answer", *lines]) + "\n")
    assert main(None, ["init", str(folder), "--model", "demo"]) == 2
    assert capsys.readouterr().err == (
        f"error: {folder / 'q.csv'}: none of its first 6 images is under {folder}, and the link "
        f"{folder / 'images' / 'coco'} leads out of it, which is not followed; add --follow-links, which writes "
        "data.follow_links: true into the recipe\n"
    )
    assert main(None, ["init", str(folder), "--model", "demo", "--follow-links"]) == 0
    assert load_recipe(folder / "recipe.yaml").data.follow_links
    capsys.readouterr()
    assert main(None, ["check", str(folder / "recipe.yaml"), "data.follow_links=false"]) == 1
    alone = ["data.follow_links=false", "model.start_from={untrained: true}"]  # without the demo's Stage 1 before it
    assert main(None, ["finetune", str(folder / "recipe.yaml"), *alone]) == 2
    assert "set data.follow_links=true to allow such links" in capsys.readouterr().err


def test_two_names_of_one_image_stay_on_one_side(content: dict[str, Any], tmp_path: Path) -> None:
    drawn(tmp_path / "images", 12)
    rows = [asked(n, f"{n}.png") for n in range(12)] + [asked(n + 12, f"images\\{n}") for n in range(12)]
    written(tmp_path / "rows.json", rows)
    content["data"]["validation_rows"] = 6
    plan = plan_run(check_recipe(content, "test"))
    sides = {
        name: {split.images.label(file) for i in range(len(split.rows)) for file in split.rows.image_files(i)}
        for name, split in plan.splits.items()
    }
    assert len(sides["validation"]) == 3
    assert not sides["train"] & sides["validation"]


def test_a_run_counts_names_its_images_and_is_asked_with_its_background(
    content: dict[str, Any], tmp_path: Path
) -> None:
    drawn(tmp_path / "images", 4)
    Image.new("RGBA", (20, 20)).save(tmp_path / "images" / "clear.png")
    Image.new("I;16", (20, 20), 4000).save(tmp_path / "images" / "deep.png")
    names = ["0.png", "C:\\imgs\\1.png", "2", "3.png ", "clear.png", "deep.png"]
    written(tmp_path / "rows.json", [asked(number, name) for number, name in enumerate(names)])
    held = json.loads((tmp_path / "rows.json").read_text())
    for row in held:
        row["conversations"][0]["value"] = "<image>\nAnd now?"
    written(tmp_path / "held.json", held)
    content["data"] |= {"background": "black", "test_source": {"path": str(tmp_path / "held.json")}}
    content["training"] |= {"max_steps": 1}
    content["evaluation"] = {"before": 0, "after": "all", "max_new_tokens": 2}
    out = io.StringIO()
    finetune(check_recipe(content, "test"), Path(), console=Console(file=out, width=400))
    assert (
        "train: fixed while reading: 2 image matched by file name, 1 image with transparency, "
        "1 image of more than 8 bits"
    ) in out.getvalue()
    folder = Path(content["output_dir"])
    found = json.loads((folder / "metrics.json").read_text())["data"]["train"]["repaired"]
    assert found == {"image matched by file name": 2, "image with transparency": 1, "image of more than 8 bits": 1}
    assert background_of(str(folder)) == "black"
    page = rebuild_report(str(folder)).read_text()
    assert all(f"<bdi>{name}</bdi>" in page for name in ("0.png", "1.png", "2.png", "3.png", "clear.png"))


def test_chat_and_page_composite_as_the_speaker_does(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (9, 8, 7, 0)).save(tmp_path / "a.png")
    for background, expected in (("white", (255,) * 3), ("black", (0,) * 3), ("llava", (9, 8, 7))):
        speaker = Speaker(None, None, "a", Stop([2]), background=background)  # type: ignore[arg-type]
        chat = Chat(speaker, Sampling())
        run_line(chat, f"/image {tmp_path / 'a.png'}")
        assert chat.attached[0].image.getpixel((0, 0)) == expected
        assert open_images([tmp_path / "a.png"], background)[0].image.getpixel((0, 0)) == expected  # type: ignore[arg-type]
        assert _opened([str(tmp_path / "a.png")], background)[0].getpixel((0, 0)) == expected  # type: ignore[arg-type]


def test_preview_names_the_files(content: dict[str, Any], tmp_path: Path) -> None:
    from lora_llava.prepare.sample_preview import preview

    drawn(tmp_path / "images", 2)
    written(tmp_path / "rows.json", [asked(0, "images/0.png"), asked(1, "1")])
    content["data"]["sources"] = [{"path": content["data"].pop("path")}]
    shown = preview(check_recipe(content, "test"), name="a", output=tmp_path / "page.html", console=quiet())
    assert {name for sample in shown.samples for name in sample.names} == {"0.png", "1.png"}
    page = (tmp_path / "page.html").read_text()
    assert re.search(r'<figcaption><a href="images/0\.png"[^>]*><bdi>0\.png</bdi></a>, as CLIP', page)
