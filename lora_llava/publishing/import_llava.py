"""`lora-llava import`: convert LLaVA's own checkpoints and LoRA folders to a stock folder or a run directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console
from transformers import GenerationConfig, LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.core.storage import file_hash
from lora_llava.data.templates.named_templates import chat_template, get_template
from lora_llava.data.templates.spans import fit_template
from lora_llava.model.adapter_file import check_fits
from lora_llava.model.adapters import NEWLINE, lora_config
from lora_llava.model.base import BaseParts, assembled_config, build_base, build_processor
from lora_llava.model.families.image_counts import grid_of
from lora_llava.model.families.llava_kinds import read_llava_config
from lora_llava.model.families.tower_families import check_tiling, image_processor_of
from lora_llava.model.provenance import component_hashes
from lora_llava.model.start import RUN_FILE
from lora_llava.model.tokenizer import copy_sentencepiece, load_tokenizer, read_vocabulary
from lora_llava.model.weights.names import ADAPTER_FILE
from lora_llava.model.weights.original_checkpoint import (
    OTHER_FILE,
    OriginalConfig,
    checkpoint_tensors,
    is_original,
    read_config,
    read_lora,
    stock_config,
)
from lora_llava.model.weights.parts import Part, load_part
from lora_llava.model.weights.tensor_files import checkpoint_bytes, lazy_tensors, write_checkpoint, write_file
from lora_llava.publishing.merge import BASE_FILE, IMPORTED
from lora_llava.publishing.new_folder import check_disk, check_new, new_folder
from lora_llava.runs.directory import set_stops, versions, write_json

_TEMPLATES = {"mistral": "mistral"}
"""Template of a checkpoint by its language model's model_type, as LLaVA's llava/eval/run_llava.py chooses it."""
_TURNS = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama_3"}
"""Tokens that begin a turn, and a template with them."""


def import_llava(
    folder: Path,
    output: Path,
    *,
    llm: str | None = None,
    vision_tower: str | None = None,
    base: str | None = None,
    template: str | None = None,
    console: Console,
) -> None:
    """Convert LLaVA's own checkpoint (to a stock folder) or LoRA folder (to a run directory).

    Args:
        folder: The output of LLaVA's training, or a published checkpoint.
        output: The new folder, which must not exist.
        llm: Language model that a LoRA folder was trained on; None takes it from adapter_config.json.
        vision_tower: The CLIP tower; None takes it from config.json.
        base: Complete stock LLaVA that a LoRA folder was trained on, instead of `llm`.
        template: Conversation template that it was trained with; None is that of Mistral for a `llava_mistral`, and
            `vicuna_v1` for any other.
        console: Prints progress and result.

    Raises:
        UserError: For a folder not written by LLaVA, or with a feature that stock transformers lacks.
    """
    check_new(output)
    original = read_config(folder)
    is_lora = (folder / "adapter_config.json").is_file()
    if not is_lora:
        lazy_tensors(folder)  # reports a damaged folder before anything is downloaded
    try:
        tower = load_part(vision_tower or original.vision_tower, None, "vision_tower")
    except UserError as error:
        raise UserError(str(error).replace("model.vision_tower:", "--vision-tower:")) from None
    if is_lora:
        _import_lora(folder, output, original, tower, llm, base, template, console)
    else:
        _import_checkpoint(folder, output, original, tower, template, console)
    console.print(f"written: {output}", soft_wrap=True)


def _import_checkpoint(
    folder: Path, output: Path, original: OriginalConfig, tower: Part, template: str | None, console: Console
) -> None:
    vision = json.loads((tower.folder / "config.json").read_text(encoding="utf-8"))
    try:
        config = stock_config(original, vision, read_vocabulary(folder, original.llm))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if original.grid:
        check_tiling(config, str(folder))
    template = template or _template_of(original, folder, config)
    tensors = checkpoint_tensors(folder, config, original, lazy_tensors(tower.folder))
    check_disk(output, checkpoint_bytes(tensors, torch.bfloat16))
    tiles = f"{len(original.grid)} canvases of tiles, " if original.grid else ""
    console.print(
        f"{folder}: a complete LLaVA, {original.projector_type} projector, {tiles}{len(tensors)} tensors, template "
        f"{template}",
        soft_wrap=True,
    )
    with new_folder(output) as temporary:
        write_checkpoint(tensors, temporary, torch.bfloat16, "converting")
        config.save_pretrained(temporary)
        _save_processor(temporary, config, folder, tower.folder, original.image_aspect, template)
        base = {"name": IMPORTED, "revision": None, "parts": None, "hashes": component_hashes(temporary)}
        write_json(temporary / BASE_FILE, {"base": base, "imported": folder.name, "versions": versions()})


def _template_of(original: OriginalConfig, folder: Path, config: LlavaConfig) -> str:
    """Return the template of a language model; refuse to guess that of a tokenizer with tokens for turns."""
    if (known := _TEMPLATES.get(original.llm["model_type"])) is not None:
        return known
    vocabulary = load_tokenizer(folder, config).get_vocab()
    for token, name in _TURNS.items():
        if token in vocabulary:
            raise UserError(
                f"{folder}: its tokenizer has {token}, so that vicuna_v1 is hardly its conversation template; set "
                f"--template, for instance to {name}"
            )
    return "vicuna_v1"


def _save_processor(
    output: Path, config: LlavaConfig, tokenizer_folder: Path, image_folder: Path, aspect: str, template: str
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder, config)
    tokenizer.padding_side = "left"
    images = image_processor_of(image_folder, config, aspect)
    written = fit_template(get_template(template, None), tokenizer)
    build_processor(tokenizer, config, images, chat_template(written)).save_pretrained(output)
    copy_sentencepiece(tokenizer_folder, output)
    text = config.text_config
    generation = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    set_stops(generation, tokenizer, written)
    generation.save_pretrained(output)


def _import_lora(
    folder: Path,
    output: Path,
    original: OriginalConfig,
    tower: Part,
    llm: str | None,
    base: str | None,
    template: str | None,
    console: Console,
) -> None:
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path", "")
    model = _language_model(folder, llm or named) if base is None else load_part(base, None, "start_from.llava")
    config = _config_of(original, model, tower) if base is None else read_llava_config(model.folder)
    _check_base(folder, original, config, model.folder)
    template = template or _template_of(original, model.folder, config)
    lora = read_lora(folder, original, config.text_config.num_hidden_layers)
    if original.grid and not lora.has_newline and base is None:
        raise UserError(
            f"{folder}/{OTHER_FILE} has no {NEWLINE}, nor has {llm or named}; if it was trained on a complete "
            "LLaVA-1.6, import that first, then name the result with --base"
        )
    parts = "a projector and a newline" if lora.has_newline else "a projector"
    console.print(
        f"{folder}: LoRA r {lora.settings['r']} on {', '.join(lora.targets)}, and {parts}, template {template}",
        soft_wrap=True,
    )
    base_folder, record = _build(original, model, tower) if base is None else _complete(base, model)
    with new_folder(output) as temporary:
        write_file(sorted(lora.tensors, key=lambda t: t.name), temporary / ADAPTER_FILE, torch.float32)
        saved = (NEWLINE,) if lora.has_newline else ()
        settings = lora_config(**lora.settings, targets=lora.targets, modules_to_save=saved, base=str(record["name"]))
        settings.inference_mode = True
        settings.save_pretrained(str(temporary))
        _check_converted(temporary, folder, config, base_folder)
        _save_processor(temporary, config, base_folder, base_folder, original.image_aspect, template)
        content = {
            "stage": 2,
            "base": record,
            "recipe_hash": None,
            "imported": folder.name,
            "adapter_sha256": file_hash(temporary / ADAPTER_FILE),
            "versions": versions(),
        }
        write_json(temporary / RUN_FILE, content)


def _check_base(folder: Path, original: OriginalConfig, config: LlavaConfig, base: Path) -> None:
    """Check that a LoRA folder and its base are of one kind, and give the base's config the folder's canvases."""
    kinds = original.llm["model_type"], config.text_config.model_type
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{folder} was trained on a {kinds[0]}, and its base {base} has a {kinds[1]}; name the right base with "
            "--base or --llm"
        )
    if (config.vision_feature_layer, config.vision_feature_select_strategy) != (
        original.feature_layer,
        original.strategy,
    ):
        raise UserError(
            f"{folder} was trained on layer {original.feature_layer} of the vision tower ({original.strategy}), but "
            "its base uses another; name the right base with --base or --llm"
        )
    own, trained = grid_of(config), [list(canvas) for canvas in original.grid]
    if sorted(own) != sorted(trained):
        found = [f"has the canvases {grid}" if grid else "has no tiles" for grid in (trained, own)]
        raise UserError(f"{folder} {found[0]}, and its base {base} {found[1]}; name the right base with --base")
    if trained:
        config.image_grid_pinpoints = trained


def _check_converted(converted: Path, folder: Path, config: LlavaConfig, base: Path) -> None:
    """Check that the converted adapter fits its base; errors name the original folder."""
    try:
        check_fits(converted, config, str(base))
    except UserError as error:
        message = str(error).replace(str(converted / ADAPTER_FILE), str(folder)).replace(str(converted), str(folder))
        raise UserError(message) from None


def _language_model(folder: Path, llm: str) -> Part:
    """Return the language model that a LoRA folder was trained on."""
    if not llm:
        raise UserError(f"{folder}/adapter_config.json names no base; name the language model with --llm")
    model = load_part(llm, None, "llm")
    if is_original(model.folder):
        raise UserError(
            f"{folder} was trained on {llm}, a complete LLaVA; import that first, then name the result with --base"
        )
    return model


def _config_of(original: OriginalConfig, model: Part, tower: Part) -> LlavaConfig:
    """Return the configuration of the base that `_build` writes."""
    content, vision = (json.loads((part.folder / "config.json").read_text("utf-8")) for part in (model, tower))
    vocabulary = read_vocabulary(model.folder, content)
    config = assembled_config(content, vision, original.projector_type, vocabulary, original.grid)
    if original.grid:
        check_tiling(config, f"{model.folder} with {tower.folder}")
    return config


def _build(original: OriginalConfig, model: Part, tower: Part) -> tuple[Path, dict[str, object]]:
    """Write the base of a LoRA folder, and return it with its entry in `run.json`."""
    parts = BaseParts(
        model.name,
        model.revision,
        tower.name,
        tower.revision,
        original.projector_type,
        projector=None,
        seed=0,
        grid=[list(canvas) for canvas in original.grid],
    )
    written = build_base(parts, model, tower, None)
    hashes = component_hashes(written)
    return written, {"name": str(written), "revision": None, "parts": parts.as_dict(), "hashes": hashes}


def _complete(base: str, part: Part) -> tuple[Path, dict[str, object]]:
    """Return the folder of a complete LLaVA that a LoRA folder was trained on, and its entry in `run.json`."""
    local = Path(base).is_dir()
    name, revision = (str(part.folder.resolve()), None) if local else (part.name, part.revision)
    return part.folder, {"name": name, "revision": revision, "parts": None, "hashes": component_hashes(part.folder)}
