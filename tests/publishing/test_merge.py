"""Merging: the merged model equals base + adapter, or nothing is written."""

from __future__ import annotations

import errno
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlavaConfig

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.model.loading import load_base
from lora_llava.model.nf4_round_trip import nf4_round_trip
from lora_llava.model.weights import tensor_files
from lora_llava.publishing.merge import merge
from lora_llava.publishing.merge_check import ProofError
from lora_llava.publishing.merge_source import read_source
from lora_llava.publishing.proof import adapted_model, compare

Train = Callable[..., Path]
MergeOnce = Callable[..., tuple[Path, str]]


def merged(run: Path, output: Path, **options: Any) -> tuple[dict[str, Any], str]:
    stream = io.StringIO()
    report = merge(run, output, console=Console(file=stream, width=160), **options)
    return report, stream.getvalue()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 800, (2, 24), generator=generator)
    ids[0, 4:8] = 896  # <image>, four patches
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32, generator=generator)}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**batch(), use_cache=False).logits


def on_base(run: Path, **options: Any) -> PeftModel:
    return PeftModel.from_pretrained(load_base(read_source(run).base, dtype="float32", **options), str(run))


GENTLE = {"rate": 0.005, "alpha": 8}
"""An adapter of the size that training produces; bf16 rounding is visible with the larger ones."""
ADAPTERS: list[dict[str, Any]] = [{}, {"rslora": True}, {"dora": True}, {"targets": ["q_proj", "down_proj"]}]


@pytest.mark.parametrize("lora", ADAPTERS, ids=str)
def test_merged_logits_equal_the_adapter_s(lora: dict[str, Any], train: Train, merge_once: MergeOnce) -> None:
    run, (folder, output) = train(**lora), merge_once(**lora)
    report = json.loads((folder / "merge_report.json").read_text())
    adapter = logits(on_base(run))
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    assert (logits(stock) - adapter).abs().max() < 1e-4
    base = logits(load_base(read_source(run).base, dtype="float32"))
    assert (base - adapter).abs().max() > 0.5  # or the comparison would also pass without the adapter
    delta = report["adapter_on_bf16_base"]
    assert delta["max_logit_difference"] <= report["tolerance"] == 1e-4
    assert (delta["greedy_equal"], delta["prompts"], report["prompts_with_image"]) == (8, 8, 4)
    assert report["prompts_from"] == "6 from the run's test split, 2 built-in"
    assert report["adapter_on_nf4_base"]["max_logit_difference"] > delta["max_logit_difference"]
    assert report["adapter_effect"] > 0.5
    assert "tolerance 0.0001 in float32" in output


@pytest.mark.parametrize("lora", ADAPTERS[:3], ids=str)
def test_merged_weights_equal_peft_s(lora: dict[str, Any], train: Train, merge_once: MergeOnce) -> None:
    theirs = on_base(train(**lora)).merge_and_unload().state_dict()
    ours = AutoModelForImageTextToText.from_pretrained(merge_once(**lora)[0], dtype="float32").state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6, msg=name)
        if "language_model.layers" not in name:
            assert torch.equal(tensor, theirs[name]), name


def test_nf4_merges_into_the_base_of_training(train: Train, tmp_path: Path) -> None:
    report, _ = merged(train(), tmp_path / "merged", dtype="float32", base="nf4")
    assert json.loads((tmp_path / "merged" / "merge_report.json").read_text()) == report
    trained = logits(on_base(train(), quantization="nf4"))
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype="float32")
    assert (logits(stock) - trained).abs().max() < 1e-4
    assert report["checked_against"] == "adapter_on_nf4_base"
    assert report["adapter_on_nf4_base"]["max_logit_difference"] < 1e-4
    assert report["adapter_on_bf16_base"]["max_logit_difference"] > 1e-2


@pytest.mark.parametrize("lora", [{}, {"dora": True}], ids=str)
def test_bf16_stays_within_twice_the_noise_of_batch_size(lora: dict[str, Any], train: Train, tmp_path: Path) -> None:
    report, _ = merged(train(**GENTLE, **lora), tmp_path / "merged")
    assert report["tolerance"] == 2 * report["batch_size_noise"]
    assert report["adapter_on_bf16_base"]["max_logit_difference"] <= report["tolerance"]
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert LlavaConfig.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("lora", [{}, {"dora": True}], ids=str)
def test_the_streamed_reference_equals_stock_peft(lora: dict[str, Any], nf4: bool, train: Train) -> None:
    run = train(**lora)
    source = read_source(run)
    dtype = torch.float32 if nf4 else None
    streamed = logits(adapted_model(source.config, source.tensors, source.adapter, torch.float32, nf4_from=dtype))
    stock = logits(on_base(run, quantization="nf4" if nf4 else "none"))
    torch.testing.assert_close(streamed, stock, rtol=0, atol=1e-5 if nf4 else 0)


def on_other_base(run: Path, folder: Path, change: Any) -> Path:
    """Move a run to a copy of its base modified by `change`, as if it had been trained on that."""
    record = json.loads((run / "run.json").read_text())
    shutil.copytree(record["base"]["name"], folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    record["base"] = {"name": str(folder), "revision": None, "parts": None, "hashes": None}
    (run / "run.json").write_text(json.dumps(record))
    return folder


def test_nf4_values_of_a_float16_base_equal_those_of_stock_loading(finished: Path, tmp_path: Path) -> None:
    def to_half(tensors: dict[str, torch.Tensor], folder: Path) -> None:
        for name, tensor in tensors.items():
            tensors[name] = (tensor.float() * 1.001).half()  # values that bf16 cannot represent

    on_other_base(finished, tmp_path / "half", to_half)
    source = read_source(finished)
    half = load_file(source.base / "model.safetensors")
    model = load_base(source.base, quantization="nf4", dtype="bfloat16")
    for name, module in model.model.language_model.layers[0].named_modules():
        if type(getattr(module, "weight", None)).__name__ == "Params4bit":
            stock = dequantize_4bit(module.weight.data, module.weight.quant_state)
            stored = half[f"language_model.model.layers.0.{name}.weight"]
            ours = nf4_round_trip(stored, torch.bfloat16).to(torch.bfloat16)
            assert torch.equal(ours, stock), name


def test_a_base_with_tied_head_merges(finished: Path, tmp_path: Path) -> None:
    def tie(tensors: dict[str, torch.Tensor], folder: Path) -> None:
        del tensors["language_model.lm_head.weight"]
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
        (folder / "config.json").write_text(json.dumps(config))

    on_other_base(finished, tmp_path / "tied", tie)
    merged(finished, tmp_path / "merged", dtype="float32")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype="float32")
    assert (logits(stock) - logits(on_base(finished))).abs().max() < 1e-4


def test_a_base_that_lacks_a_weight_is_reported_before_writing(finished: Path, tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor], folder: Path) -> None:
        del tensors["language_model.lm_head.weight"]

    on_other_base(finished, tmp_path / "other", drop)
    with pytest.raises(UserError, match=r"other lacks lm_head\.weight, which its config\.json requires"):
        merged(finished, tmp_path / "merged")


def test_built_in_prompts_replace_missing_data(finished: Path, tmp_path: Path) -> None:
    recipe = (finished / "recipe.yaml").read_text()
    (finished / "recipe.yaml").write_text(re.sub(r"  path: .*", "  path: /mnt/team/gone", recipe))
    report, output = merged(finished, tmp_path / "merged", dtype="float32")
    assert report["prompts_from"] == "0 from the run's data (not available), 8 built-in"
    assert report["prompts_with_image"] == 4
    assert "/mnt/team" not in json.dumps(report) + output


def test_a_streamed_model_holds_no_weights_after_a_pass(train: Train) -> None:
    source = read_source(train())
    model = adapted_model(source.config, source.tensors, source.adapter, torch.float32)
    logits(model)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_shards_merge_to_the_same_weights(train: Train, tmp_path: Path, monkeypatch: Any) -> None:
    merged(train(**GENTLE), tmp_path / "one")
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 60_000)
    merged(train(**GENTLE), tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = (AutoModelForImageTextToText.from_pretrained(tmp_path / n).state_dict() for n in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_stage_1_run_merges_its_projector(train: Train, tmp_path: Path) -> None:
    run = train(stage=1, quantization="none")
    merged(run, tmp_path / "merged", dtype="float32")
    projector = {n: t for n, t in load_file(run / "adapter_model.safetensors").items() if "projector" in n}
    state = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in projector.items():
        assert torch.equal(state[name.split("base_model.model.model.")[1]], tensor)
    with pytest.raises(UserError, match="is a Stage 1 run without LoRA"):
        merged(run, tmp_path / "other", projector_only=True)


def test_projector_only_leaves_an_adapter_that_peft_loads(train: Train, tmp_path: Path) -> None:
    merged(train(), tmp_path / "two", projector_only=True, dtype="float32")
    config = json.loads((tmp_path / "two" / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert config["base_model_name_or_path"] == str(tmp_path / "two" / "base")
    names = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    assert len(names) == 2 * 2 * 7
    assert all(".lora_" in name for name in names)
    base = AutoModelForImageTextToText.from_pretrained(config["base_model_name_or_path"], dtype="float32")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "two" / "adapter")), logits(on_base(train())))


def test_projector_only_merges_the_lora_of_the_tower(train: Train, tmp_path: Path) -> None:
    run = train(quantization="none", vision={"r": 2})
    merged(run, tmp_path / "two", projector_only=True, dtype="float32")
    names = load_file(tmp_path / "two/adapter/adapter_model.safetensors")
    assert len(names) == 2 * 2 * 7
    assert not any("vision_tower" in name for name in names)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "two/base", dtype="float32")
    served = logits(PeftModel.from_pretrained(base, tmp_path / "two/adapter"))
    assert (served - logits(on_base(run))).abs().max() <= 1e-4


def change_adapter(run: Path, change: Any) -> None:
    tensors = load_file(run / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, run / "adapter_model.safetensors")
    record = json.loads((run / "run.json").read_text())
    del record["adapter_sha256"]  # as in a run of an older version, so that the tensors are checked
    (run / "run.json").write_text(json.dumps(record))


def nothing_left(folder: Path) -> bool:
    return [path.name for path in folder.iterdir()] == ["finished"]


def poison(tensors: dict[str, torch.Tensor]) -> None:
    next(t for name, t in sorted(tensors.items()) if "lora_B" in name)[0, 0] = float("nan")


def test_a_nan_in_the_last_prompt_is_detected() -> None:
    good = [torch.zeros(9, 5), torch.zeros(9, 5)]
    bad = [torch.zeros(9, 5), torch.full((9, 5), float("nan"))]
    assert math.isnan(compare(good, bad, [[0], [0]]).max_logit_difference)
    assert compare(good, good, [[0], [0]]).greedy_equal == 2


def test_the_check_fails_for_another_projector(train: Train, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """A merge with a wrong projector is rejected and leaves nothing."""
    from lora_llava.publishing import merge as module

    write_checkpoint = module.write_checkpoint

    def faulty(tensors: Any, *rest: Any) -> Any:
        from dataclasses import replace

        wrong = [replace(t, load=lambda t=t: t.load() * 1.5) if "projector" in t.name else t for t in tensors]
        return write_checkpoint(wrong, *rest)

    monkeypatch.setattr(module, "write_checkpoint", faulty)
    with pytest.raises(ProofError, match="logits differ by"):
        merged(train(), tmp_path / "merged", dtype="float32")
    assert list(tmp_path.iterdir()) == []
    assert main("merge", [str(train()), "--output", str(tmp_path / "merged")]) == 1
    assert "nothing was kept" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing(train: Train, tmp_path: Path, monkeypatch: Any) -> None:
    from lora_llava.publishing import merge as module

    def interrupted(*rest: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "prove", interrupted)
    assert main("merge", [str(train()), "--output", str(tmp_path / "merged")]) == 130
    assert list(tmp_path.iterdir()) == []


def drop_projector(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "projector" in name]:
        del tensors[name]


def drop_one_up(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.language_model.layers.0.mlp.up_proj.lora_B.weight"]


def widen(tensors: dict[str, torch.Tensor]) -> None:
    name = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_B.weight"
    tensors[name] = torch.cat([tensors[name]] * 2)


def add_layer(tensors: dict[str, torch.Tensor]) -> None:
    for half in ("lora_A", "lora_B"):
        old = f"base_model.model.model.language_model.layers.0.mlp.up_proj.{half}.weight"
        tensors[old.replace("layers.0", "layers.7")] = tensors[old].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_projector, r"model\.multi_modal_projector\.linear_1\.bias is missing \(tensors at fault: 4 of 32\)"),
        (drop_one_up, r"layers\.0\.mlp\.up_proj\.lora_B\.weight is missing \(tensors at fault: 1 of 32\)"),
        (
            widen,
            r"layers\.0\.mlp\.up_proj\.lora_B\.weight has shape 256 x 4, not 128 x 4 \(tensors at fault: 1 of 32\)",
        ),
        (add_layer, r"layers\.7\.mlp\.up_proj\.lora_A\.weight is not expected \(tensors at fault: 2 of 32\)"),
        (
            poison,
            r"layers\.0\.mlp\.down_proj\.lora_B\.weight has values that are not finite \(tensors at fault: 1 of 32\)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line(change: Any, message: str, finished: Path, tmp_path: Path) -> None:
    change_adapter(finished, change)
    with pytest.raises(UserError, match=message):
        merged(finished, tmp_path / "merged")
    assert nothing_left(tmp_path)


def test_a_truncated_adapter_is_one_line(finished: Path, tmp_path: Path) -> None:
    file = finished / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors has changed since it was saved"):
        merged(finished, tmp_path / "merged")


def test_another_base_is_rejected(finished: Path, tmp_path: Path) -> None:
    record = json.loads((finished / "run.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(record["base"]["name"], other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    record["base"]["name"] = str(other)
    (finished / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"was trained on another llm \(.*\) than .*/other holds"):
        merged(finished, tmp_path / "merged")


def test_a_full_disk_is_reported_before_writing(train: Train, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"needs 67,\d{3},\d{3} bytes \(0.1 GB\), but 1,000 \(0.0 GB\) are free"):
        merged(train(), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_writing_is_one_line(
    train: Train, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main("merge", [str(train()), "--output", str(tmp_path / "merged")]) == 1
    assert "the disk is full; free some space, then run the same command again" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_a_call_are_reported_without_traceback(
    train: Train, finished: Path, tmp_path: Path, capsys: Any
) -> None:
    def error_of(run: Path, output: Path) -> str:
        assert main("merge", [str(run), "--output", str(output)]) == 2
        return capsys.readouterr().err

    assert "does not exist; name a run directory" in error_of(tmp_path / "nope", tmp_path / "merged")
    (tmp_path / "file").write_text("")
    assert "is not writable; choose another --output" in error_of(train(), tmp_path / "file" / "merged")
    (finished / "run.json").write_text("[1]")
    assert "run.json names no base model; restore it" in error_of(finished, tmp_path / "merged")
    (finished / "run.json").write_bytes((train() / "run.json").read_bytes())
    (finished / "tokenizer.json").write_text('{"a": 1}')
    assert "its processor or tokenizer cannot be loaded" in error_of(finished, tmp_path / "merged")
    whole = json.loads((train() / "run.json").read_text())["base"]["name"]
    assert "is a complete model, not a run" in error_of(Path(whole), tmp_path / "merged")


def test_base_and_adapter_may_move_together(train: Train, tmp_path: Path) -> None:
    merged(train(), tmp_path / "two", projector_only=True)
    (tmp_path / "two").rename(tmp_path / "moved")
    assert read_source(tmp_path / "moved" / "adapter").base == tmp_path / "moved" / "base"


def test_an_existing_folder_is_not_overwritten(train: Train, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match="exists already; choose another --output, or remove it"):
        merged(train(), tmp_path / "merged")
    with pytest.raises(UserError, match="is not a finished run"):
        merged(tmp_path / "merged", tmp_path / "other")
