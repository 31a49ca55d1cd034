"""Load a model for inference: a run, a merged folder or a Hub id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoProcessor, LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.model.families.tower_families import saved_image_settings, tiling_of
from lora_llava.model.loading import Quantization, load_base
from lora_llava.model.start import RUN_FILE


def load_answering_model(
    base: str, adapter: Path | None, *, quantization: Quantization = "none", dtype: str = "auto"
) -> Any:
    """Load a model for generation.

    Args:
        base: Folder or Hub id of the adapter's base (`locate_base` finds a run's), or of the complete model.
        adapter: A run directory; None for the base alone.
        quantization: How the language model's weights are stored.
        dtype: The dtype of the computation.

    Returns:
        The model in eval mode.

    Raises:
        UserError: If the base cannot be loaded, or the adapter does not fit it.
    """
    if adapter is not None and quantization != "nf4" and needs_nf4(adapter):
        raise UserError(f"{adapter} corrects NF4's rounding (lora.init loftq); load it with quantization nf4")
    model = load_base(base, quantization=quantization, dtype=dtype)
    if adapter is None:
        return model
    use_tiles_of(model.config, saved_image_settings(adapter) or {})
    try:
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{adapter} does not fit its base {base}: {str(error).splitlines()[0]}") from None


def use_tiles_of(config: LlavaConfig, image_processor: Mapping[str, Any]) -> None:
    """Let a LLaVA-1.6 expect the tiles of a run's image processor, which may have fewer canvases than its base.

    Args:
        config: The model's config; changed in place.
        image_processor: The processor's settings.
    """
    grid = image_processor.get("image_grid_pinpoints")
    if tiling_of(config) is not None and grid:
        config.image_grid_pinpoints = [list(canvas) for canvas in grid]


def needs_nf4(adapter: Path) -> bool:
    """Check whether an adapter fits the NF4 base alone, by its `run.json`."""
    file = adapter / RUN_FILE
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("needs_base") == "nf4"


def load_processor(folder: Path) -> Any:
    """Load the stock processor of a run or model folder, with the PIL backend of training and left padding.

    Raises:
        UserError: If its files are missing or damaged.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
        processor.tokenizer.padding_side = "left"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{folder}: its processor or tokenizer cannot be loaded ({reason}); restore its files"
        ) from None
    return processor
