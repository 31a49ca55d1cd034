"""Load a model for inference: a run, a merged folder or a Hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoProcessor

from lora_llava.core.errors import UserError
from lora_llava.model.loading import Quantization, load_base


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
    model = load_base(base, quantization=quantization, dtype=dtype)
    if adapter is None:
        return model
    try:
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{adapter} does not fit its base {base}: {str(error).splitlines()[0]}") from None


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
