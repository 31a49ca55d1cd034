"""A complete LLaVA keeps its image processing and its chat template unless the recipe names others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from lora_llava.commands.main import main
from lora_llava.data.templates.chat_template import ChatTemplate
from lora_llava.data.templates.named_templates import chat_template, get_template
from lora_llava.data.templates.spans import AnyTemplate
from lora_llava.model.start import Base, plan_model, prepare_base
from lora_llava.planning.run_plan import build_run_processor
from lora_llava.recipe import dump_recipe
from lora_llava.recipe.io import check_recipe
from lora_llava.runs.resume import check_changes

LLAVA_1_5 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The chat template of llava-hf's LLaVA-1.5, whose answers do not end."""
SQUARE = {"height": 32, "width": 32}
SAVED = [
    ("clip", CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)),
    ("clip", CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=SQUARE, resample=2, image_mean=[0.1] * 3)),
    ("clip", CLIPImageProcessorPil(size=SQUARE, do_center_crop=False)),
    ("clip", LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 32}, crop_size=SQUARE)),
    ("siglip", SiglipImageProcessorPil(size={"height": 28, "width": 28}, image_std=[0.3] * 3)),
]
PHOTO = Image.fromarray((np.random.default_rng(0).random((40, 60, 3)) * 255).astype(np.uint8))
Made = Callable[..., dict[str, Any]]


@pytest.fixture
def llava(base: Callable[[str, str], Base], stage2_content: dict[str, Any], tmp_path: Path) -> Made:
    """Gives a recipe's content that starts from a complete LLaVA saved with a processor and a chat template."""

    def made(tower: str, processor: Any = None, template: str | None = None, family: str = "llama") -> dict[str, Any]:
        folder = tmp_path / "llava"
        shutil.copytree(base(family, tower).folder, folder)
        if processor is not None:
            (folder / "processor_config.json").unlink()
            content = processor if isinstance(processor, dict) else processor.to_dict()
            (folder / "preprocessor_config.json").write_text(json.dumps(content))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        del stage2_content["data"]["system_prompt"]
        return stage2_content | {"model": {"start_from": {"llava": str(folder)}, "quantization": "none"}}

    return made


def built(content: dict[str, Any], **data: Any) -> tuple[Any, AnyTemplate]:
    """Return the image processor and the template of a run."""
    recipe = check_recipe(content | {"data": content["data"] | data}, "test")
    _, processor, template = build_run_processor(recipe, plan_model(recipe.model))
    return processor.image_processor, template


def pixels(image_processor: Any, image: Image.Image = PHOTO) -> torch.Tensor:
    return torch.as_tensor(image_processor([image], return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize(("tower", "saved"), SAVED)
def test_auto_is_the_image_processing_that_was_saved(llava: Made, tmp_path: Path, tower: str, saved: Any) -> None:
    content = llava(tower, saved)
    found, _ = built(content)
    assert torch.equal(pixels(found), pixels(saved))
    found.save_pretrained(tmp_path / "saved")
    assert torch.equal(pixels(type(found).from_pretrained(tmp_path / "saved")), pixels(saved))
    pad, _ = built(content, image_aspect="pad")
    assert pad.do_pad
    assert pad.image_mean == tuple(saved.image_mean) or list(pad.image_mean) == list(saved.image_mean)


def test_auto_is_pad_for_a_llava_of_parts_and_for_one_without_a_processor(
    stage2_content: dict[str, Any], llava: Made, tmp_path: Path
) -> None:
    assert built(stage2_content)[0].to_dict() == built(stage2_content, image_aspect="pad")[0].to_dict()
    content = llava("clip")
    assert built(content)[0].do_pad  # of a base folder of ours, as it was written
    (tmp_path / "llava" / "processor_config.json").unlink()
    assert built(content)[0].do_pad


def test_a_base_of_ours_is_read_as_its_parts_are(stage2_content: dict[str, Any]) -> None:
    expected, _ = built(stage2_content)
    folder = prepare_base(check_recipe(stage2_content, "test").model, 0).folder
    stage2_content["model"] = {"start_from": {"llava": str(folder)}}
    assert built(stage2_content)[0].to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"image_processor_type": "LlavaNextImageProcessor"}, "is a LlavaNextImageProcessor; those that work are"),
        ({"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 48}}, "gives 224x224 pixels"),
        (
            {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": False},
            "gives 32x57 or 57x32 pixels, and its tower takes 32x32",
        ),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"wide": 3}}, "cannot be used ("),
        ({"image_processor_type": "CLIPImageProcessor", "size": SQUARE, "image_mean": [0.5]}, "cannot be used ("),
    ],
)
def test_a_processor_that_does_not_fit_is_one_line(
    llava: Made, tmp_path: Path, saved: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = llava("clip", saved)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(check_recipe(content, "test")))
    assert main("plan", [str(file)]) == 2
    printed = capsys.readouterr().err.rpartition("error: ")[2]
    assert message in printed
    assert printed.startswith("data.image_aspect is auto, but ")
    assert printed.endswith("; set data.image_aspect to pad or crop\n")
    assert printed.count("\n") == 1
    assert built(content, image_aspect="pad")[0].do_pad


def test_the_stock_auto_processor_gives_the_same_pixels(llava: Made, tmp_path: Path) -> None:
    found, _ = built(llava("siglip"), image_aspect="auto")
    stock = AutoProcessor.from_pretrained(tmp_path / "llava", backend="pil").image_processor
    assert torch.equal(pixels(found), pixels(stock))


def test_a_chat_template_that_was_saved_is_kept(llava: Made) -> None:
    text = chat_template(get_template("chatml"))
    _, found = built(llava("clip", template=text, family="smollm2"))
    assert found.stop == "<|im_end|>"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ChatTemplate(text, (), "").render(messages[:1], True).endswith(asked)


def test_llava_1_5_s_own_template_is_vicuna_v1(llava: Made) -> None:
    _, found = built(llava("clip", template=LLAVA_1_5))
    assert found.name == "vicuna_v1"
    assert found.stop == "</s>"


def test_an_earlier_run_with_pad_written_out_is_the_same_run(stage2_content: dict[str, Any], llava: Made) -> None:
    auto = check_recipe(stage2_content, "test")
    pad = check_recipe(stage2_content | {"data": stage2_content["data"] | {"image_aspect": "pad"}}, "test")
    assert check_changes(pad, auto, (), 1) == check_changes(auto, pad, (), 1) == ()
    complete = llava("clip")
    auto = check_recipe(complete, "test")
    pad = check_recipe(complete | {"data": complete["data"] | {"image_aspect": "pad"}}, "test")
    with pytest.raises(Exception, match=r"data\.image_aspect was 'pad' and is 'auto'; undo that"):
        check_changes(pad, auto, (), 1)
