"""Every verb rejects an incomplete adapter: missing tensors, wrong shapes or changed values."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.model.adapter_file import check_fits, refuse_settings
from lora_llava.model.loading import load_base
from lora_llava.publishing.merge_source import read_source
from lora_llava.recipe.io import check_recipe
from lora_llava.training.finetune import finetune

Train = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
LAYER = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
PROJECTOR = "base_model.model.model.multi_modal_projector"


def drop_layer(tensors: Tensors) -> None:
    del tensors[f"{LAYER}.lora_A.weight"], tensors[f"{LAYER}.lora_B.weight"]


def drop_bias(tensors: Tensors) -> None:
    del tensors[f"{PROJECTOR}.linear_2.bias"]


def transpose(tensors: Tensors) -> None:
    tensors[f"{LAYER}.lora_A.weight"] = tensors[f"{LAYER}.lora_A.weight"].T.contiguous()


CHANGES = [
    (drop_layer, "layers.1.self_attn.q_proj.lora_A.weight is missing (tensors at fault: 2 of 32)"),
    (drop_bias, "model.multi_modal_projector.linear_2.bias is missing (tensors at fault: 1 of 32)"),
    (transpose, "layers.1.self_attn.q_proj.lora_A.weight has shape 64 x 4, not 4 x 64 (tensors at fault: 1 of 32)"),
]


def change(run: Path, how: Callable[[Tensors], None], *, recorded: bool = False) -> None:
    file = run / "adapter_model.safetensors"
    tensors = load_file(file)
    how(tensors)
    save_file(tensors, file)
    if not recorded:
        record = json.loads((run / "run.json").read_text())
        del record["adapter_sha256"]
        (run / "run.json").write_text(json.dumps(record))


def every_verb(run: Path, tmp_path: Path) -> list[tuple[str, list[str]]]:
    return [
        ("evaluate", [str(run), "--output", str(tmp_path / "answers")]),
        ("merge", [str(run), "--output", str(tmp_path / "merged")]),
        ("push", [str(run), "someone/tiny", "--base-repo", "someone/base", "--dry-run"]),
        ("chat", [str(run), "--prompt", "What is it?"]),
    ]


@pytest.mark.parametrize(("how", "message"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_verb_rejects_an_incomplete_adapter(
    how: Callable[[Tensors], None], message: str, finished: Path, tmp_path: Path, capsys: Any
) -> None:
    change(finished, how)
    for verb, arguments in every_verb(finished, tmp_path):
        assert main(verb, arguments) == 2, verb
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, verb
        assert message in errors[0], verb
    assert [path.name for path in tmp_path.iterdir()] == ["finished"]


def test_a_changed_value_is_detected_by_the_recorded_hash(finished: Path, tmp_path: Path, capsys: Any) -> None:
    def add_one(tensors: Tensors) -> None:
        tensors[f"{LAYER}.lora_B.weight"] += 1

    change(finished, add_one, recorded=True)
    for verb, arguments in every_verb(finished, tmp_path):
        assert main(verb, arguments) == 2, verb
        assert "adapter_model.safetensors has changed since it was saved (its SHA" in capsys.readouterr().err, verb


def test_a_stage_2_run_rejects_an_incomplete_stage_1_projector(
    train: Train, scienceqa: Path, parts: Path, tmp_path: Path
) -> None:
    import shutil

    stage1 = Path(shutil.copytree(train(stage=1), tmp_path / "stage1"))
    change(stage1, drop_bias)
    content: dict[str, Any] = {
        "stage": 2,
        "output_dir": str(tmp_path / "run"),
        "lora": {},
        "model": {
            "llm": str(parts / "llm"),
            "vision_tower": str(parts / "vision_tower"),
            "start_from": {"stage1_run": str(stage1)},
        },
        "data": {"format": "scienceqa", "path": str(scienceqa), "max_length": 400},
        "training": {"learning_rate": 0.01, "max_steps": 1},
    }
    with pytest.raises(UserError, match=r"stage1_run: .*linear_2\.bias is missing \(tensors at fault: 1 of 4\)"):
        finetune(check_recipe(content, "test"), Path(), console=Console(file=io.StringIO()))


@pytest.mark.parametrize(
    "options", [{}, {"dora": True}, {"rslora": True}, {"stage": 1}, {"targets": ["v_proj"]}], ids=str
)
def test_every_adapter_that_a_run_saves_fits(options: dict[str, Any], train: Train) -> None:
    read_source(train(**options))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fan_in_fan_out", True),
        ("bias", "all"),
        ("use_qalora", True),
        ("lora_bias", True),
        ("layers_to_transform", [0]),
        ("target_parameters", ["x"]),
        ("some_later_setting", 0.5),
        ("init_lora_weights", "pissa_niter_4"),
    ],
)
def test_unsupported_settings_are_rejected(name: str, value: Any, finished: Path) -> None:
    file = finished / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(UserError, match=rf"adapter_config\.json: {name} is "):
        read_source(finished)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("alpha_pattern", {"up_proj": "x"}, "alpha_pattern of up_proj is 'x'; it should be a number above 0"),
        ("alpha_pattern", {"(": 8}, r"alpha_pattern of \( is 8"),
        ("rank_pattern", {"up_proj": 0}, "rank_pattern of up_proj is 0; it should be a whole number above 0"),
        ("rank_pattern", {"up_proj": 8}, r"up_proj\.lora_A\.weight has shape 4 x 64, not 8 x 64"),
        ("trainable_token_indices", {"embed_tokens": ["1"]}, "trainable_token_indices has .* a list of token ids"),
        ("trainable_token_indices", [10**6], "does not fit the base"),
        ("trainable_token_indices", [1], "trainable_tokens_delta is missing"),
    ],
)
def test_settings_of_layers_and_tokens_are_checked(name: str, value: Any, message: str, finished: Path) -> None:
    file = finished / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(UserError, match=message) as error:
        read_source(finished)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_of_layers_are_those_of_peft(rslora: bool, finished: Path) -> None:
    file = finished / "adapter_config.json"
    pattern = {"alpha_pattern": {"up_proj": 6.0, r".*layers\.1\.self_attn\..*": 3}, "use_rslora": rslora}
    file.write_text(json.dumps(json.loads(file.read_text()) | pattern))
    source = read_source(finished)
    theirs = PeftModel.from_pretrained(load_base(source.base, dtype="float32"), str(finished))
    found = {
        name: module.scaling["default"]
        for name, module in theirs.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }
    assert {name: layer.scaling for name, layer in source.adapter.layers.items()} == found
    assert len(set(found.values())) == 3


def test_llava_s_own_settings_are_accepted() -> None:
    written = {
        "base_model_name_or_path": "x",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 256,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 128,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    refuse_settings(written, Path("adapter_config.json"))


def test_the_error_for_an_adapter_of_another_base_names_the_base(finished: Path) -> None:
    config = LlavaConfig.from_pretrained(read_source(finished).base)
    config.text_config.num_hidden_layers = 3
    with pytest.raises(UserError, match=r"the base LARGER: .*layers\.2\.mlp\.down_proj\.lora_A\.weight is missing"):
        check_fits(finished, config, "LARGER")
