"""Keys of recipes that have a new name: the old one is accepted with a warning, both together are an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_llava.recipe import RecipeError, find_recipe, load_generate_recipe
from lora_llava.recipe.io import RENAMED_KEYS


def test_an_old_key_is_accepted_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert RENAMED_KEYS == {"samples_per_picture": "samples_per_image"}
    text = find_recipe("demo_generate.yaml").read_text()
    old = tmp_path / "old.yaml"
    old.write_text(text.replace("samples_per_image: 2", "samples_per_picture: 2"))
    assert load_generate_recipe(old).samples_per_image == 2
    assert capsys.readouterr().err == (
        f"warning: {old}: samples_per_picture is now called samples_per_image; use the new name\n"
    )
    assert load_generate_recipe("demo_generate.yaml", ["samples_per_picture=3", "samples=null"]).samples_per_image == 3


def test_both_names_of_a_key_are_an_error(tmp_path: Path) -> None:
    both = tmp_path / "both.yaml"
    both.write_text(find_recipe("demo_generate.yaml").read_text() + "\nsamples_per_picture: 2\n")
    with pytest.raises(
        RecipeError, match=r"both\.yaml: samples_per_picture is the old name of samples_per_image; keep"
    ):
        load_generate_recipe(both)
