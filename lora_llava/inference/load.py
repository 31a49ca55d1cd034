"""Loading what is to answer: a run, a merged folder or a Hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from lora_llava.errors import UserError
from lora_llava.model.loading import Quantization, load_base


@dataclass(frozen=True)
class BaseName:
    """What `load_base` takes: a folder or Hub id and its revision."""

    name: str
    revision: str | None = None


def load_answering_model(
    base: BaseName, adapter: Path | None, *, quantization: Quantization = "none", dtype: str = "auto"
) -> Any:
    """Load a model for generation.

    Args:
        base: What the adapter stands on, or the whole model.
        adapter: A run directory; None for the base alone.
        quantization: How the language model is stored.
        dtype: What is computed in.

    Returns:
        The model in eval mode.

    Raises:
        UserError: Where the base is gone or the adapter is another base's.
    """
    if adapter is not None and base.name.startswith("/") and not Path(base.name).is_dir():
        raise UserError(f"{adapter} stands on {base.name}, which is gone; train again, or put the base back there")
    model = load_base(base.name, quantization=quantization, dtype=dtype, revision=base.revision)
    if adapter is None:
        return model
    try:
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{adapter} does not fit its base {base.name}: {str(error).splitlines()[0]}") from None
