"""`init --llm --vision-tower`: a recipe for a new LLaVA, and parts that cannot make one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_llava.commands.main import main
from lora_llava.data.templates.named_templates import TEMPLATES, chat_template
from lora_llava.recipe import load_recipe
from tests.own_rows import asked, drawn, written


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Write a folder with four images and a question about each."""
    folder = drawn(tmp_path / "mine", 4)
    written(folder / "rows.json", [asked(i, file.name) for i, file in enumerate(sorted(folder.glob("*.png")))])
    return folder


@pytest.mark.parametrize(("llm", "tower"), [("qwen2", "siglip"), ("phi3", "clip")])
def test_init_writes_a_recipe_for_the_parts_that_passes_the_check(
    made: Path, rows: Path, llm: str, tower: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with_template = shutil.copytree(made / llm, rows.parent / "llm")
    (with_template / "chat_template.jinja").write_text(str(chat_template(TEMPLATES["chatml"])))
    assert main(None, ["init", str(rows), "--llm", str(with_template), "--vision-tower", str(made / tower)]) == 0
    section = load_recipe(rows / "recipe.yaml").model
    assert (section.llm, section.vision_tower) == (str(with_template), str(made / tower))
    assert section.start_from.untrained
    out = " ".join(capsys.readouterr().out.split())
    assert "its projector is untrained" in out
    assert "4 rows checked: 0 errors" in out


def test_a_recipe_of_high_resolution_gives_tiles_to_the_parts(
    made: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_template = shutil.copytree(made / "phi3", rows.parent / "llm")
    (with_template / "chat_template.jinja").write_text(str(chat_template(TEMPLATES["chatml"])))
    parts = ["--llm", str(with_template), "--vision-tower", str(made / "clip")]
    main(None, ["init", str(rows), *parts, "--recipe", "my_data_highres_12gb.yaml"])
    section = load_recipe(rows / "recipe.yaml").model
    assert section.high_resolution is not None
    assert section.high_resolution.grid is None
    assert section.max_tiles == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "recipes/align.yaml with the same llm, vision_tower and high_resolution" in out


REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (["--llm", "PART", "--model", "demo"], {}, "--model demo is a complete one; drop one"),
    (["--vision-tower", "PART"], {}, "--vision-tower needs --llm"),
    (
        ["--llm", "PART", "--vision-tower", "TOWER"],
        {"model_type": "qwen2_vl", "vision_config": {}},
        "is a 'qwen2_vl' model with a vision_config",
    ),
    (
        ["--llm", "PART", "--vision-tower", "TOWER"],
        {"model_type": "gemma2", "vocab_size": 300},
        "gemma2 has final_logit_softcapping 30.0",
    ),
    (
        ["--llm", "PART", "--vision-tower", "TOWER"],
        {"model_type": "clip_vision_model"},
        "which is not a causal language model",
    ),
    (["--llm", "QWEN", "--vision-tower", "TOWER"], {}, "the language model has no chat template; name the one"),
    (["--llm", "LLM", "--vision-tower", "PART"], {"model_type": "dinov2"}, "the towers that work are"),
    (["--llm", "LLM", "--vision-tower", "PART"], {"model_type": "siglip2_vision_model"}, "no fixed grid"),
]


@pytest.mark.parametrize(("flags", "config", "message"), REFUSED, ids=[message[:24] for *_, message in REFUSED])
def test_parts_that_cannot_make_a_llava_are_refused_in_one_line(
    made: Path,
    rows: Path,
    tmp_path: Path,
    flags: list[str],
    config: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    part = tmp_path / "part"
    part.mkdir()
    (part / "config.json").write_text(json.dumps({"vocab_size": 300} | config))
    places = {"PART": str(part), "LLM": str(made / "llama"), "QWEN": str(made / "qwen2"), "TOWER": str(made / "clip")}
    assert main(None, ["init", str(rows), *(places.get(flag, flag) for flag in flags)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
