"""Open a model for chat: a run, a folder with a complete LLaVA, or a Hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError

from lora_llava.core.errors import UserError
from lora_llava.data.images.to_rgb import Background
from lora_llava.data.templates.named_templates import TEMPLATES, Template, chat_template, get_template
from lora_llava.data.tokens import Stop, stop_of
from lora_llava.inference.load import load_answering_model, load_processor, use_tiles_of
from lora_llava.inference.speak import Speaker, text_message
from lora_llava.model.adapter_file import checked_base
from lora_llava.model.loading import Quantization
from lora_llava.model.start import plan_model
from lora_llava.model.vision import llava_of
from lora_llava.recipe import ModelSection, StartFrom, load_recipe
from lora_llava.recipe.io import RECIPE_FILE
from lora_llava.runs.check_run import check_run
from lora_llava.runs.directory import is_run, read_record


def open_speaker(
    name: str,
    *,
    quantization: Literal["auto", "nf4", "none"] = "auto",
    dtype: str = "auto",
    template: str | None = None,
    base_only: bool = False,
) -> Speaker:
    """Load a model with the processor that writes its prompts.

    Args:
        name: A run directory, a folder with a complete LLaVA, or a Hub id.
        quantization: How the language model's weights are stored; `auto` follows the run, and is `none` for a
            complete model.
        dtype: The dtype of the computation; `auto` follows the run, else bfloat16 on a GPU, or float16 on one without
            it, and float32 on a CPU.
        template: Conversation template that replaces the processor's.
        base_only: Whether to load a run's base without its trained weights.

    Returns:
        The speaker.

    Raises:
        UserError: For a model that is missing, does not fit or has no chat template.
    """
    check_run(name, "a run, a folder with a complete LLaVA, or a Hub id", hub=True)
    folder, given = Path(name), get_template(template) if template else None
    adapter = folder if is_run(folder) else None
    if adapter is not None:
        base = str(checked_base(read_record(folder), folder))
        if (folder / RECIPE_FILE).is_file():  # an imported run has none
            own = load_recipe(folder / RECIPE_FILE).model
            quantization = own.quantization if quantization == "auto" else quantization
            dtype = own.dtype if dtype == "auto" else dtype
    elif base_only:
        raise UserError(f"--base-only: {name} is a complete model, not a run with an adapter; leave the flag out")
    else:
        base, folder = name, _find_complete_model(name)
    processor = load_processor(folder)
    if given is not None:
        processor.chat_template = chat_template(given)
    elif not processor.chat_template:
        raise UserError(
            f"{name} has no chat template; set --template to the one it was trained with: {', '.join(TEMPLATES)}"
        )
    known = given or recognise_template(processor)
    stored: Quantization = "none" if quantization == "auto" else quantization
    model = load_answering_model(base, None if base_only else adapter, quantization=stored, dtype=dtype)
    use_tiles_of(llava_of(model).config, processor.image_processor.to_dict())
    return Speaker(
        model,
        processor,
        name,
        _stop(processor.tokenizer, folder, known),
        single_turn=known is not None and known.single_turn,
        background=background_of(name),
    )


def _stop(tokenizer: Any, folder: Path, template: Template | None) -> Stop:
    """Return where answers end: as its generation_config.json says, and as the template does if it is known."""
    stop = stop_of(tokenizer, template.stop if template else None, template.stop_string if template else None)
    file = folder / "generation_config.json"
    saved = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    more = [saved] if isinstance(saved, int) else saved or []
    return Stop(list(dict.fromkeys([*stop.ids, *more])), stop.text)


def background_of(name: str) -> Background:
    """Return the colour behind transparent parts of images: the one in the model's recipe, else white.

    Args:
        name: A run directory, a merged folder, another model's folder or a Hub id.
    """
    recipe = Path(name) / RECIPE_FILE
    return load_recipe(recipe).data.background if recipe.is_file() else "white"


def _find_complete_model(name: str) -> Path:
    """Return the folder of a complete LLaVA's processor; the small files of a Hub id are downloaded."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(
            f"{name} is neither a finished run, which has run.json and adapter_model.safetensors, nor a folder with a "
            "complete LLaVA, which has config.json; name one of these"
        )
    try:
        return plan_model(ModelSection(start_from=StartFrom(llava=name))).tokenizer_folder
    except UserError as error:
        raise UserError(str(error).removeprefix("model.start_from.llava: ")) from None


def recognise_template(processor: Any) -> Template | None:
    """Return the template in `TEMPLATES` that a processor uses, with any system prompt; None for an unknown one.

    The comparison is on a rendered conversation, so templates saved by older versions are recognised too.
    """
    turns = [text_message(role, role) for role in ("system", "user", "assistant", "user")]
    written = _written(processor, turns, processor.chat_template)
    return next((t for t in TEMPLATES.values() if _written(processor, turns, chat_template(t)) == written), None)


def _written(processor: Any, turns: list[dict[str, Any]], template: str) -> str:
    try:
        return str(processor.apply_chat_template(turns, chat_template=template, add_generation_prompt=True))
    except TemplateError:  # a template that rejects system messages is not in TEMPLATES
        return ""
