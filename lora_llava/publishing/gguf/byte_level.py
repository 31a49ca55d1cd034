"""llama.cpp's names of byte-level BPE pre-tokenizers, found by what tokenizer.json says and not by a model's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PATTERNS = {
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
}
"""llama.cpp, src/llama-vocab.cpp, `llm_tokenizer_bpe`; the original patterns stand beside its adapted ones."""


def byte_level_name(content: dict[str, Any], file: Path) -> str:
    """Return llama.cpp's name of a pre-tokenizer.

    Args:
        content: A tokenizer.json.
        file: Its path, for messages.

    Raises:
        UserError: If llama.cpp has none that splits equally.
    """
    name = _name(content)
    if name is None:
        raise UserError(
            f"{file}: the GGUF writer does not know its pre-tokenizer or normalizer; it knows those of GPT-2, SmolLM, "
            "Qwen2 and Llama 3. Merge the run, and convert the folder with llama.cpp's convert_hf_to_gguf.py"
        )
    return name


def _name(content: dict[str, Any]) -> str | None:
    normalizer = content.get("normalizer") or {}
    if normalizer.get("type") not in (None, "NFC"):  # NFC: llama.cpp leaves it out, as its converter does
        return None
    pre = content.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    ignores = bool(content["model"].get("ignore_merges"))
    by_regex, before = steps[-1].get("use_regex", True), steps[:-1]
    if by_regex and not before:
        return None if ignores else "gpt-2"
    if by_regex and before == [{"type": "Digits", "individual_digits": True}]:
        return None if ignores else "smollm"
    if by_regex or len(before) != 1 or before[0].get("type") != "Split" or before[0].get("invert"):
        return None
    name = _PATTERNS.get(before[0].get("pattern", {}).get("Regex", ""))
    return name if before[0].get("behavior") == "Isolated" and ignores == (name == "llama-bpe") else None
