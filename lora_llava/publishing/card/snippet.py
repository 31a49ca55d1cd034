"""The code in a model card that loads the model."""

from __future__ import annotations

import json
from pathlib import Path

from lora_llava.model.loading import NOT_QUANTIZED
from lora_llava.publishing.package import Package

_ASK = """messages = [{"role": "user", "content": [
    {"type": "image", "image": Image.open("image.png")},
    {"type": "text", "text": "What is shown?"},
]}]
"""


def loading_snippet(package: Package, repo_id: str) -> str:
    """Write Markdown with Python code that answers a question about `image.png` without lora_llava.

    Args:
        package: The published files.
        repo_id: The repository, `owner/name`.
    """
    stops = _stop_strings(package.folder / "generation_config.json")
    if package.kind == "model":
        stop = f", stop_sequence={json.dumps(stops[0])}" if stops else ""
        return f"""Install the requirements with `pip install transformers pillow torch`, then run:

```python
from PIL import Image
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="{repo_id}")
{_ASK}print(pipe(text=messages, max_new_tokens=128, return_full_text=False{stop})[0]["generated_text"])
```"""
    revision = package.record["base"].get("revision")
    where = f'"{package.base}"' + (f', revision="{revision}"' if revision else "")
    # The base has more canvases than the run, or has those of LLaVA's own training in another order.
    other = package.recipe.get("model", {}).get("max_tiles") is not None or "imported" in package.record
    other = other and package.class_name == "LlavaNextForConditionalGeneration"
    grid = "base.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints\n" if other else ""
    stop = f", stop_strings={json.dumps(stops)}, tokenizer=processor.tokenizer" if stops else ""
    code = f"""Install the requirements with `pip install transformers peft pillow torch`, then run:

```python
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained({where}, dtype="auto")
model = PeftModel.from_pretrained(base, "{repo_id}")
processor = AutoProcessor.from_pretrained("{repo_id}")
{grid}{_ASK}inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=128{stop})
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
    if package.recipe.get("model", {}).get("quantization") == "nf4":
        kept = ", ".join(f'"{name}"' for name in NOT_QUANTIZED)
        only = package.record.get("needs_base") == "nf4"
        why = "started as a correction of NF4's rounding, and fits no other base" if only else "was trained on it"
        code += (
            f"\n\nThe base was quantised to NF4 in training; the adapter {why}. To load the base in the same way, run "
            "`pip install bitsandbytes` and pass this to `AutoModelForImageTextToText.from_pretrained`: "
            f'`quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            f"bnb_4bit_use_double_quant=True, llm_int8_skip_modules=[{kept}])`."
        )
    return code


def _stop_strings(file: Path) -> list[str] | None:
    """Return the stop strings, if any: text that ends an answer, for which `generate` also needs the tokenizer."""
    return json.loads(file.read_text(encoding="utf-8")).get("stop_strings") if file.is_file() else None
