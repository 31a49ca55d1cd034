"""The recipe whose rows are those of a file."""

from __future__ import annotations

from pathlib import Path

from lora_llava.evaluation.asked.data_file import DataFile, with_data_file
from lora_llava.recipe import load_recipe


def test_a_run_that_may_stop_early_is_asked_about_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("Bild;Frage;Antwort\na.png;Was?;ja\n")
    overrides = ["training.early_stopping={patience: 3}", "training.eval_every=5"]
    found = with_data_file(load_recipe("demo_my_data_qlora.yaml", overrides), DataFile(tmp_path / "rows.csv"))
    assert found.training.early_stopping is None
    assert found.data.test_source is not None
    assert (found.data.test_source.columns.question, found.data.validation_rows) == ("Frage", 0)
    assert found.data.test_source.image_folder == str(tmp_path)


def test_captions_of_a_run_over_captions_stay_captions(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(
        '[{"image": "a.png", "conversations": [{"from": "human", "value": "Say."}, {"from": "gpt", "value": "A."}]}]'
    )
    found = with_data_file(load_recipe("demo_align.yaml"), DataFile(tmp_path / "chat.json"))
    assert found.data.test_source is not None
    assert found.data.test_source.format == "captions"
