"""Importing LLaVA-1.6 from LLaVA's own format: canvases, logits, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, LlavaNextForConditionalGeneration

from lora_llava.core.errors import UserError
from lora_llava.inference.open_model import open_speaker
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import stream_answer, user_message
from lora_llava.model.adapter_file import check_fits
from lora_llava.model.vision import llava_of
from lora_llava.publishing.card.snippet import loading_snippet
from lora_llava.publishing.import_llava import import_llava
from lora_llava.publishing.merge import merge
from lora_llava.publishing.package import collect
from tests.model.small_tiled import images
from tests.once import once
from tests.publishing.llava_tiles import CANVASES, OwnLlava

QUIET = Console(file=io.StringIO(), width=160)
QUESTION = "What is shown?"


@pytest.fixture(scope="module", params=["llama", "mistral"])
def imported(
    parts: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[OwnLlava, Path]:
    """A LLaVA-1.6 as LLaVA computes it, and the folder that import makes of its checkpoint."""
    own = OwnLlava(parts / "llm", request.param)

    def write(folder: Path) -> None:
        import_llava(own.save(folder / "llava"), folder / "stock", console=QUIET)

    return own, once(tmp_path_factory, f"imported_tiles_{request.param}", write) / "stock"


def test_an_imported_folder_computes_what_llava_does(imported: tuple[OwnLlava, Path]) -> None:
    own, folder = imported
    model, info = LlavaNextForConditionalGeneration.from_pretrained(
        folder, dtype="float32", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.image_grid_pinpoints == [[64, 32], [32, 64], [64, 64], [32, 96], [96, 32]]
    assert_llava_s_logits(model, folder, own)


def assert_llava_s_logits(model: Any, folder: Path, own: OwnLlava, tolerance: float = 1e-5) -> None:
    """Compare logits with LLaVA's, on the prompts of a folder's processor."""
    processor = AutoProcessor.from_pretrained(folder)
    for image in images().values():
        content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
        batch = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            ours = model.eval()(**batch).logits
        theirs = own.logits(QUESTION, image)
        assert ours.shape[1] == theirs.shape[1]
        torch.testing.assert_close(ours[..., : theirs.shape[2]], theirs, rtol=0, atol=tolerance)


def test_the_checkpoint_s_tower_and_newline_are_kept_and_it_answers(imported: tuple[OwnLlava, Path]) -> None:
    own, folder = imported
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["image_newline"].float(), own.newline)
    for name, tensor in own.tower.state_dict().items():
        stored = tensors[f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"]
        assert torch.equal(stored.float(), tensor)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    assert text["model_type"] == own.kind
    assert not [key for key in text if key.startswith(("mm_", "tune_", "freeze_", "unfreeze_", "image_"))]
    speaker = open_speaker(str(folder))
    assert ("[INST]" in speaker.processor.chat_template) == (own.kind == "mistral")


def test_canvases_are_read_as_llava_s_arguments_write_them(parts: Path, tmp_path: Path) -> None:
    own = OwnLlava(parts / "llm")
    folder = own.save(tmp_path / "llava", image_grid_pinpoints="[(32, 64), (96, 32)]", mm_vision_select_layer=-2)
    import_llava(folder, tmp_path / "stock", console=QUIET)
    for name, key in (("config.json", None), ("processor_config.json", "image_processor")):
        content = json.loads((tmp_path / "stock" / name).read_text())
        assert (content[key] if key else content)["image_grid_pinpoints"] == [[64, 32], [32, 96]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_grid_pinpoints": "(1x1),...,(6x6)"},
            r"image_grid_pinpoints is '\(1x1\),...,\(6x6\)'; it should be a l",
        ),
        ({"image_grid_pinpoints": None}, r"image_grid_pinpoints is None; it should be a list of widths and heights"),
        ({"image_grid_pinpoints": [[32, "64"]]}, r"image_grid_pinpoints is \[\[32, '64'\]\]; it should be"),
        ({"image_grid_pinpoints": [[32, 60]]}, r"llava: image_grid_pinpoints is \[\[60, 32\]\]; each of its canvases"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is flat and image_aspect_ratio anyres; stock models"),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type is spatial and image_aspect_ratio anyres"),
        ({"mm_patch_merge_type": "spatial_unpad_maxpool2x2"}, "mm_patch_merge_type is spatial_unpad_maxpool2x2 and"),
        ({"image_aspect_ratio": "pad"}, "mm_patch_merge_type is spatial_unpad and image_aspect_ratio pad"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio is anyres_max_9; only pad, square and anyres are"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is cls_patch; with tiles only patch is"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type is perceiver; stock models have no resampler"),
        ({"model_type": "llava_mpt"}, "model_type is llava_mpt; only llava, llava_llama and llava_mistral are supp"),
    ],
)
def test_what_stock_models_do_not_compute_is_refused(
    changes: dict[str, Any], message: str, own_checkpoint: Path
) -> None:
    config = own_checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        import_llava(own_checkpoint, own_checkpoint.parent / "stock", console=QUIET)
    assert not (own_checkpoint.parent / "stock").exists()


def test_the_template_of_a_tokenizer_with_tokens_for_turns_is_not_guessed(own_checkpoint: Path, parts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parts / "llm")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(own_checkpoint)
    output = own_checkpoint.parent / "stock"
    with pytest.raises(UserError, match=r"its tokenizer has <\|im_start\|>, so that vicuna_v1 is hardly .* to chatml"):
        import_llava(own_checkpoint, output, console=QUIET)
    import_llava(own_checkpoint, output, template="chatml", console=QUIET)
    assert "<|im_start|>" in (output / "chat_template.jinja").read_text()


@pytest.fixture
def own_checkpoint(parts: Path, tmp_path: Path) -> Path:
    return OwnLlava(parts / "llm").save(tmp_path / "llava")


def test_missing_weights_are_named(own_checkpoint: Path) -> None:
    file, output = own_checkpoint / "pytorch_model.bin", own_checkpoint.parent / "stock"
    content = torch.load(file)
    newline = content.pop("model.image_newline")
    torch.save(content, file)
    with pytest.raises(UserError, match=r"model\.image_newline is missing \(1 tensors in all\)"):
        import_llava(own_checkpoint, output, console=QUIET)
    content = {name: tensor for name, tensor in content.items() if ".vision_tower." not in name}
    torch.save(content | {"model.image_newline": newline}, file)
    with pytest.raises(UserError, match="unfreeze_mm_vision_tower is true, but its weights have no vision tower"):
        import_llava(own_checkpoint, output, console=QUIET)


def stock(adapter: Path) -> Any:
    """Load a run with stock transformers and PEFT alone."""
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = LlavaNextForConditionalGeneration.from_pretrained(base, dtype="float32", attn_implementation="eager")
    return PeftModel.from_pretrained(model, str(adapter))


def test_a_lora_folder_with_a_newline_computes_what_llava_does_and_merges(parts: Path, tmp_path: Path) -> None:
    own = OwnLlava(parts / "llm")
    own.train(newline=True)
    written = own.save_parts(tmp_path)
    folder = own.save_lora(tmp_path / "lora", written / "llm", written / "tower")
    run = tmp_path / "run"
    import_llava(folder, run, console=QUIET)
    assert json.loads((run / "adapter_config.json").read_text())["modules_to_save"] == [
        "multi_modal_projector",
        "image_newline",
    ]
    assert_llava_s_logits(stock(run), run, own, 5e-5)  # LLaVA adds LoRA to the weights first
    report = merge(run, tmp_path / "merged", dtype="float32", console=QUIET)
    assert report["adapter_on_bf16_base"]["max_logit_difference"] <= 1e-4
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["image_newline"], own.newline)
    merged = LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "merged", dtype="float32", attn_implementation="eager"
    )
    assert_llava_s_logits(merged, tmp_path / "merged", own, 5e-5)
    image = images()["small.png"]
    answers = [
        "".join(stream_answer(open_speaker(str(model)), [user_message(QUESTION, [image])], Sampling(max_new_tokens=8)))
        for model in (run, tmp_path / "merged")
    ]
    assert answers[0] == answers[1] != ""
    content = load_file(run / "adapter_model.safetensors")
    del content["base_model.model.model.image_newline"]
    save_file(content, run / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"model\.image_newline is missing"):
        check_fits(run, merged.config, "the base")


def test_a_lora_folder_without_newline_has_that_of_its_base(
    imported: tuple[OwnLlava, Path], parts: Path, tmp_path: Path
) -> None:
    before, base = imported
    own = OwnLlava(parts / "llm", before.kind)
    own.train(newline=False)
    folder = own.save_lora(tmp_path / "lora", Path("liuhaotian/llava"), base.parent / "clip")
    import_llava(folder, tmp_path / "run", base=str(base), console=QUIET)
    assert_llava_s_logits(stock(tmp_path / "run"), tmp_path / "run", own, 5e-5)
    written = own.save_parts(tmp_path / "parts")
    with pytest.raises(UserError, match=r"non_lora_trainables\.bin has no image_newline, nor has .*llm; if it was"):
        import_llava(folder, tmp_path / "other", llm=str(written / "llm"), console=QUIET)


def test_a_base_of_other_tiles_is_refused(imported: tuple[OwnLlava, Path], parts: Path, tmp_path: Path) -> None:
    own, base = OwnLlava(parts / "llm", imported[0].kind), imported[1]
    own.train(newline=False)
    other = "mistral" if own.kind == "llama" else "llama"
    for number, (changes, message) in enumerate(
        (
            (
                {"model_type": f"llava_{other}"},
                f"lora was trained on a {other}, and its base .* has a {own.kind}; name",
            ),
            (
                {"image_grid_pinpoints": [[32, 64]]},
                r"lora has the canvases \[\[64, 32\]\], and its base .* has the canvases \[\[6",
            ),
            (
                {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"},
                "lora has no tiles, and its base .* has the canv",
            ),
        )
    ):
        folder = own.save_lora(tmp_path / f"{number}lora", Path("llava"), base.parent / "clip", **changes)
        with pytest.raises(UserError, match=message):
            import_llava(folder, tmp_path / "run", base=str(base), console=QUIET)


def test_a_run_keeps_llava_s_order_of_canvases_on_a_base_of_another(
    imported: tuple[OwnLlava, Path], parts: Path, tmp_path: Path
) -> None:
    base, own = Path(shutil.copytree(imported[1], tmp_path / "base")), OwnLlava(parts / "llm", imported[0].kind)
    for name in ("config.json", "processor_config.json"):  # as llava-hf's are
        content = json.loads((base / name).read_text())
        content.get("image_processor", content)["image_grid_pinpoints"] = CANVASES
        (base / name).write_text(json.dumps(content))
    own.train(newline=False)
    folder = own.save_lora(tmp_path / "lora", Path("llava"), imported[1].parent / "clip")
    import_llava(folder, tmp_path / "run", base=str(base), console=QUIET)
    model, processor = stock(tmp_path / "run"), AutoProcessor.from_pretrained(tmp_path / "run")
    line = "base.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints"
    assert line in loading_snippet(collect(tmp_path / "run", "me/base"), "me/run")
    model.get_base_model().config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints
    assert_llava_s_logits(model, tmp_path / "run", own, 5e-5)
    assert llava_of(open_speaker(str(tmp_path / "run")).model).config.image_grid_pinpoints[0] == [64, 32]
