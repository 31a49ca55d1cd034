"""`lora-llava generate-data`: the demo offline from contexts to training, other teachers, and mistakes in the call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from inference.chat_server import ChatLog
from synthesis.made import recipe_of, teach, write_contexts, write_recipe
from transformers import AutoTokenizer

from lora_llava.commands.main import main
from lora_llava.recipe import json_schema, load_generate_recipe, shipped_generate_recipes
from lora_llava.synthesis.contexts.context import Context, write_context
from lora_llava.synthesis.generation import generate
from lora_llava.synthesis.pipeline import PipelineSettings, write_request
from lora_llava.synthesis.prompts import load_prompts
from lora_llava.synthesis.sample import FLAVOURS, Task
from lora_llava.synthesis.teachers.local_teacher import load_teacher
from lora_llava.synthesis.teachers.teacher import TeacherRequest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def rows_of(file: Path) -> list[Any]:
    return list(json.loads(file.read_text()))


@pytest.mark.slow
def test_the_demo_from_contexts_to_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the README's commands with a shortened training."""
    monkeypatch.chdir(tmp_path)
    assert main(None, ["generate_data", "recipes/demo_generate.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "contexts: images: 300, captions: 300" in printed
    assert "samples: 600 (conversation 220, detail 87, reasoning 293)" in printed
    rows = rows_of(Path("runs/demo_generate/instruct.json"))
    assert f"{len(rows)} rows in runs/demo_generate/instruct.json" in printed
    assert len(rows) > 500
    again = Path("runs/demo_generate/instruct.json").read_bytes()
    assert main("generate-data", ["demo_generate.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == len(rows)
    assert Path("runs/demo_generate/instruct.json").read_bytes() == again
    card = Path("runs/demo_generate/README.md").read_text()
    assert "rules, not by a language model" in card
    assert main("check", ["demo_generated_qlora.yaml"]) == 0
    assert main("preview", ["demo_generated_qlora.yaml"]) == 0
    short = ["training.max_steps=2", "evaluation=null", "model.start_from={untrained: true}"]
    assert main("finetune", ["demo_generated_qlora.yaml", *short]) == 0


def test_a_dry_run_prints_a_prompt_of_each_flavour_and_sends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = {"url": "http://127.0.0.1:9", "price_in": 1.0, "price_out": 2.0}
    recipe = recipe_of(tmp_path / "own", "", 12, teacher=teacher, samples=12)
    assert main("generate-data", [write_recipe(recipe, tmp_path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    prompts = load_prompts()
    assert all(prompts[flavour].system in printed for flavour in FLAVOURS)
    assert ": [0.1, 0.2, 0.3, 0.4]" in printed
    assert "12 requests, and more if answers are rejected: about " in printed
    # 12 x 1,024 completion tokens at 2 USD per million, plus the prompt tokens
    assert "at most 12,288 completion tokens; up to 0.0" in printed
    assert not (tmp_path / "own" / "set").exists()


def test_it_starts_without_torch(tmp_path: Path) -> None:
    recipe = write_recipe(recipe_of(tmp_path / "own", "http://127.0.0.1:9", 3), tmp_path)
    call = f"main('generate-data', [{recipe!r}, '--dry-run'])"
    code = f"import sys; from lora_llava.commands.main import main; {call}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["teacher.model=gpt-x"], "does not know the model 'gpt-x' (HTTP 404); it has: judge, other"),
        (["teacher.model=null"], "has 2 models; name one: judge, other"),
        (["teacher.url=http://127.0.0.1:9/v1"], "cannot be reached"),
        (["teacher.backend=transformers"], "url is set with backend transformers; drop it"),
        (["contexts.captions=OWN"], "contexts.captions"),
        (["contexts.contexts=gone.jsonl"], "gone.jsonl is missing"),
        (["contexts={contexts: demo, images: own}"], "contexts.images: own is set, but contexts.contexts is demo"),
        (["contexts={}"], "name at least one of captions, instances, contexts, boxes"),
        (["samples=1000"], "samples: 1,000 samples include 367 of conversation, but only 4 images suit it"),
        (["flavours={conversation: 0, detail: 0, reasoning: 0}"], "every weight is 0"),
        (["prompts=nowhere"], "nowhere"),
        (["teacher.structure=true"], 'teacher.structure is not a key of a recipe (did you mean "structured"?)'),
        (["--max-cost", "1"], "--max-cost needs the model's prices"),
        (["stage=2"], ""),
    ],
)
def test_mistakes_are_one_line(
    log: ChatLog, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], expected: str
) -> None:
    log.models = ["judge", "other"]
    recipe = recipe_of(tmp_path / "own", log.url, 4)
    given = [text.replace("OWN", str(write_contexts(tmp_path / "c.jsonl", 2))) for text in change]
    assert main("generate-data", [write_recipe(recipe, tmp_path), *given]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert expected in error[0]


def test_a_missing_key_is_an_error(log: ChatLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.behave = lambda body, count: "401"
    assert main("generate-data", [write_recipe(recipe_of(tmp_path / "own", log.url, 4), tmp_path)]) == 2
    assert "refuses the key (HTTP 401); set OPENAI_API_KEY to a valid one" in capsys.readouterr().err


def test_each_verb_names_the_right_verb_for_other_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("finetune", ["demo_generate.yaml"]) == 2
    assert "generates data; run it with lora-llava generate-data" in capsys.readouterr().err
    assert main("generate-data", ["demo_align.yaml"]) == 2
    assert "trains a model; run it with lora-llava finetune" in capsys.readouterr().err


def test_shipped_recipes_load_and_their_schema_is_current() -> None:
    assert [file.name for file in shipped_generate_recipes()] == ["demo_generate.yaml", "generate_instruct.yaml"]
    for file in shipped_generate_recipes():
        assert load_generate_recipe(file).output_dir.startswith("runs/")
        assert file.read_text().startswith("# yaml-language-server: $schema=generate_schema.json\n")
    assert json.loads((RECIPES / "generate_schema.json").read_text()) == json.loads(json_schema("generate_schema.json"))


def test_a_local_model_is_a_teacher(parts: Path, tmp_path: Path) -> None:
    """A tiny model writes nonsense; its requests, token counts and answers are checked."""
    folder = tmp_path / "teacher"
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(parts / "llm").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(parts / "llm")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    context = Context("1.jpg", ("A dog.",))
    task = Task("1-detail-0", 0, "detail", 0)
    settings = PipelineSettings(str(folder), max_tokens=5, temperature=0.0, structured=False)
    request = write_request(task, context, load_prompts()["detail"], settings)
    found = dict(load_teacher(str(folder), "float32", 2)([TeacherRequest(task, context, request, "key", 0)] * 3))
    assert sorted(found) == [0, 1, 2]
    assert len({answer.text for answer in found.values()}) == 1
    text = tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
    assert write_context(context) in text
    assert found[0].prompt_tokens == len(tokenizer(text, add_special_tokens=False).input_ids)
    assert 1 <= found[0].completion_tokens <= 5


def test_an_incomplete_run_exits_with_code_one(
    log: ChatLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(recipe_of(tmp_path / "own", log.url, 6), tmp_path)
    assert main("generate-data", [recipe, "--max-requests", "2"]) == 1
    assert "the set is incomplete; run the same command to resume" in capsys.readouterr().out
    assert main("generate-data", [recipe]) == 0
    assert len(log.requests) == 6


def test_unpaired_surrogates_do_not_stop_a_run(log: ChatLog, tmp_path: Path) -> None:
    log.answer = lambda body: teach(body).replace("near", "\ud800 near", 1) if "ball 2" in str(body) else teach(body)
    recipe = recipe_of(tmp_path / "own", log.url, 4)
    from rich.console import Console

    summary = generate(recipe, console=Console(quiet=True))
    assert summary["complete"]
    assert summary["rows"] + summary["rejected"] == 4
