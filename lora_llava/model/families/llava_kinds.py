"""The stock classes of LLaVA: 1.5, which sees an image at one size, and 1.6, which sees it in tiles too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
)

from lora_llava.core.errors import UserError
from lora_llava.model.families.language_families import build_config

TILED = "llava_next"
"""The model_type of LLaVA-1.6 (transformers, models/llava_next)."""
LLAVA_KINDS = {"llava": LlavaForConditionalGeneration, TILED: LlavaNextForConditionalGeneration}
"""Stock classes by model_type."""


def llava_class(config: LlavaConfig) -> Any:
    """Return the stock class of a LLaVA's model.

    Args:
        config: A `LlavaConfig` or a `LlavaNextConfig`.
    """
    return LLAVA_KINDS[config.model_type]


def build_llava_config(content: Mapping[str, Any], where: str) -> LlavaConfig:
    """Return the configuration of a LLaVA, of the class that its `model_type` names.

    Args:
        content: Its config.json.
        where: The start of messages.

    Raises:
        UserError: If it is not a LLaVA's.
    """
    kind = content.get("model_type")
    if kind not in LLAVA_KINDS:
        raise UserError(f"{where} is a {kind!r} model, not a LLaVA")
    config_class = LlavaNextConfig if kind == TILED else LlavaConfig
    return build_config(config_class, content, f"{where}: config.json is not a LLaVA's")


def read_llava_config(base: str | Path, revision: str | None = None) -> LlavaConfig:
    """Read the configuration of a LLaVA.

    Args:
        base: Its folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
    """
    content, _ = PreTrainedConfig.get_config_dict(base, revision=revision)
    config_class = LlavaNextConfig if content.get("model_type") == TILED else LlavaConfig
    return config_class.from_pretrained(base, revision=revision)
