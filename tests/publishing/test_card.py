"""The model card: the run's records, conflicting licences, and nothing else."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image

from lora_llava.publishing.card.licences import card_licence, conflicts, licence_of
from lora_llava.publishing.card.model_card import add_card, licences_of
from lora_llava.publishing.package import Package, collect, public_recipe
from lora_llava.publishing.private_content import scan
from lora_llava.recipe import load_recipe
from lora_llava.runs.directory import hub_ids

Train = Callable[..., Path]


@pytest.fixture
def vicuna_run(finished: Path) -> Path:
    """Build a run like one of the 7B recipe: its recipe and parts, with a small run's weights and figures."""
    shutil.copyfile(Path(__file__).parents[2] / "recipes" / "scienceqa_qlora.yaml", finished / "recipe.yaml")
    record = json.loads((finished / "run.json").read_text())
    recipe = load_recipe(finished / "recipe.yaml").model
    record["base"]["parts"] |= {
        "llm": recipe.llm,
        "llm_revision": recipe.llm_revision,
        "vision_tower": recipe.vision_tower,
        "vision_tower_revision": recipe.vision_tower_revision,
    }
    record["hub_ids"] = hub_ids(load_recipe(finished / "recipe.yaml"))
    (finished / "run.json").write_text(json.dumps(record))
    return finished


def card_of(folder: Path, repo_id: str = "me/pets") -> tuple[Package, str]:
    package = collect(folder, "me/base", "c" * 40)
    add_card(package, repo_id)
    content = package.files["README.md"]
    assert isinstance(content, bytes)
    return package, content.decode()


def test_metadata_comes_from_the_run(vicuna_run: Path) -> None:
    package, card = card_of(vicuna_run)
    data = ModelCard(card).data
    assert data.base_model == ["me/base"]
    assert data.library_name == "peft"
    assert data.pipeline_tag == "image-text-to-text"
    assert data.datasets == ["derek-thomas/ScienceQA"]
    assert data.tags == ["llava", "lora_llava", "lora", "qlora"]
    assert data.license == "other"
    table = package.metrics["after"]
    for result in data.eval_results:
        column = result.metric_name.split(", ")[1].split(" ")[0]
        assert result.metric_value == table[column][0]
        assert (result.dataset_type, result.dataset_split) == ("derek-thomas/ScienceQA", "test")
    assert len(data.eval_results) == sum(table[column][2] > 0 for column in table if column != "unparsed")


def test_eval_results_follow_hugging_face_s_format(vicuna_run: Path) -> None:
    package, _ = card_of(vicuna_run)
    content = package.files[".eval_results/scienceqa.yaml"]
    assert isinstance(content, bytes)
    (entry,) = parse_eval_result_entries(yaml.safe_load(content))
    assert (entry.dataset_id, entry.task_id) == ("derek-thomas/ScienceQA", "default")
    assert entry.value == package.metrics["after"]["AVG"][0]
    assert entry.notes.startswith(
        f"{package.metrics['after']['AVG'][1]} of 6 questions correct; prompt QCM-LEA, greedy"
    )


def test_a_part_of_the_split_or_local_data_gives_no_eval_results(vicuna_run: Path, train: Train) -> None:
    text = (vicuna_run / "recipe.yaml").read_text().replace("before: 200", "after: 200")
    (vicuna_run / "recipe.yaml").write_text(text)
    assert not any(name.startswith(".eval_results") for name in card_of(vicuna_run)[0].files)
    assert not any(name.startswith(".eval_results") for name in card_of(train())[0].files)


def test_body_holds_data_settings_cost_and_curve(train: Train) -> None:
    package, card = card_of(train())
    train_figures = package.metrics["train"]
    for line in (
        "| training rows | 24 of 24 used; dropped: none; cut: 0 |",
        "| LoRA | r 4, alpha 32, dropout 0, on all linear layers of the language model |",
        "| quantisation during training | NF4 with double quantisation |",
        "| learning rate | 0.05 (projector 0.05), cosine schedule, warm-up ratio 0.03 |",
        "| batch | 8 samples x 1 accumulation step |",
        "| optimizer | adamw_torch, weight decay 0 |",
        f"| peak memory | {train_figures['peak_memory_bytes'] / 2**30:.2f} GiB |",
        "| trained parameters | LoRA 8,704, projector 6,272 |",
        f"SHA-256 before local paths were shortened: `{package.record['recipe_hash'][:12]}`",
        "![Loss over steps](loss_curve.png)",
        "All values were measured during the training run, with the adapter on the NF4 base.",
    ):
        assert line in card, line
    curve = package.files["loss_curve.png"]
    assert isinstance(curve, bytes)
    assert Image.open(io.BytesIO(curve)).size == (840, 420)
    assert len(train_figures["loss_curve"]["train"]) == 4
    assert re.search(r"\| before training \|( (\d+\.\d\d|–) \|){9} \d+ \|", card)


def test_no_placeholder_and_no_local_path(train: Train, vicuna_run: Path) -> None:
    for folder in (train(), vicuna_run):
        _, card = card_of(folder)
        assert not re.search(r"TODO|TBD|More Information Needed|YOU/|None\b|nan\b|\{\}|\[\]", card)
        assert "/tmp" not in card
        assert scan("README.md", card.encode()) == []


def test_a_card_is_reproducible(train: Train) -> None:
    one, two = card_of(train())[0].files, card_of(train())[0].files
    assert one == two


def test_conflicting_licences_are_named(vicuna_run: Path) -> None:
    package, card = card_of(vicuna_run)
    assert card_licence(licences_of(package)) == "other"
    assert "The language model lmsys/vicuna-7b-v1.5: Llama 2 Community License" in card
    assert (
        "It is allowed for the language model lmsys/vicuna-7b-v1.5 (Llama 2 Community License) and the vision tower "
        "openai/clip-vit-large-patch14-336 (MIT), but not for the data set derek-thomas/ScienceQA (CC BY-NC-SA 4.0). "
    ) in card
    projector = "liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5"
    assert f"because lora_llava does not know them: the projector {projector}." in card


def test_a_shared_licence_is_that_of_the_card() -> None:
    demo = [licence_of("demo", part) for part in ("a", "b")]
    assert card_licence(demo) == "apache-2.0"
    assert conflicts(demo) == []
    assert card_licence([]) is None


def test_stage_1_s_data_of_a_continued_run_is_named_once() -> None:
    stage1 = {"data": "captions.json", "hub_ids": []}
    record = {"stage1": stage1, "continues": {"run": "a", "data": [], "stage1": stage1}}
    [found] = licences_of(Package(Path(), "adapter", {}, record))
    assert found.part == "the Stage 1 data set captions.json"


def test_a_licence_set_by_the_user_takes_precedence(train: Train) -> None:
    package = collect(train(), "me/base")
    add_card(package, "me/pets", "mit")
    content = package.files["README.md"]
    assert isinstance(content, bytes)
    assert ModelCard(content.decode()).data.license == "mit"


def test_a_recipe_s_local_paths_are_shortened_to_their_names() -> None:
    content = load_recipe("scienceqa_qlora.yaml").model_dump(mode="json")
    content["output_dir"] = "C:\\Users\\alice\\runs\\pets"
    content["data"]["path"], content["data"]["image_folder"] = "/home/alice/pets", "~/images"
    public = public_recipe(content, {"lmsys/vicuna-7b-v1.5"})
    assert public["output_dir"] == "pets"
    assert (public["data"]["path"], public["data"]["image_folder"]) == ("pets", "images")
    assert public["model"]["llm"] == "lmsys/vicuna-7b-v1.5"
    assert public["model"]["vision_tower"] == "clip-vit-large-patch14-336"  # a folder when the run began


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("see /home/bob/x", "a path into a home"),
        ('"/Users/bob/x"', "a path into a home"),
        ("file:///home/bob", "a path into a home"),
        ("D:\\\\Users\\\\bob", "a path into a home"),
        ("AKIA" + "A1B2" * 4, "an AWS key"),
        ("ghp_" + "a1B2" * 9, "a GitHub token"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
    ],
)
def test_the_scan_finds_secrets_and_home_paths(text: str, what: str) -> None:
    assert [(found.line, found.what) for found in scan("f", f"one\n{text}\n".encode())] == [(2, what)]


def test_absolute_paths_are_found_in_generated_files() -> None:
    content = b'{"a": "/mnt/team/x.json", "b": "https://huggingface.co/me/x", "c": "5/7 of it", "d": "D:\\x\\y"}'
    found = scan("f", content, written_by_us=True)
    assert [(finding.line, finding.what) for finding in found] == [(1, "a local path")]
    assert scan("f", content) == []
    assert scan("f", b"see https://huggingface.co/me/x and (5/7)", written_by_us=True) == []


@pytest.mark.parametrize("text", ["https://x.org/home/page", "models/root/x", "hf_hub", "sk-learn", "user@example.com"])
def test_the_scan_accepts_harmless_text(text: str) -> None:
    assert scan("f", text.encode()) == []


def test_public_benchmarks_stand_in_the_card(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert "## Public benchmarks" not in card_of(finished)[1]
    metrics["benchmarks"] = {"pope": {"questions": 9000, "before": {"pope_f1_score": 0.8}, "after": {"acc": 0.5}}}
    (finished / "metrics.json").write_text(json.dumps(metrics))
    card = card_of(finished)[1]
    start = card.index("## Public benchmarks")
    assert card[start:].splitlines()[2:8] == [
        "| benchmark | metric | before | after | LLaVA-1.5-7B |",
        "| --- | --- | --- | --- | --- |",
        r"| pope | pope\_f1\_score | 80.0 | – | 85.9 |",
        "|  | acc | – | 0.5 | – |",
        "",
        "Questions: 9,000 of pope. Scored by lmms-eval.",
    ]
    assert card[start:].splitlines()[8].startswith("LLaVA-1.5-7B: docs/MODEL")
