"""A batch of questions on a card that is not there: the first pass over the prompts, and the last step of answers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from lora_llava.inference.batches import question_bytes
from lora_llava.model.adapters import add_adapters
from lora_llava.model.random_weights import build_random_llava
from lora_llava.planning.run_plan import run_lora_config
from tests.simulation.meter import Meter
from tests.simulation.settings import Setting, config_of, recipe_of
from tests.simulation.simulated_step import on_card


@torch.no_grad()
def measure_answers(
    setting: Setting, meters: list[Meter], rows: int, tokens: int, new_tokens: int, adapter: bool
) -> dict[str, Any]:
    """Return the bytes planned and counted for a batch besides the weights, at the setting's layers.

    Args:
        setting: Model and recipe.
        meters: From `pretend`.
        rows: Questions.
        tokens: Tokens of each prompt, its padding included.
        new_tokens: Tokens of each answer.
        adapter: Whether the model has its adapter.
    """
    meter, config = Meter(), config_of(setting, 32000, 31999)
    lora = run_lora_config(recipe_of(setting), config)
    device = torch.device("cuda", 0)
    with on_card(meter, meters):
        model: Any = build_random_llava(
            config, quantization="nf4", dtype=torch.bfloat16, device=device, with_tower=False
        )
        if adapter:
            model = add_adapters(model, lora).eval()
        text, weights = config.text_config, meter.total
        planned = rows * question_bytes(model, tokens, new_tokens=new_tokens)
        meter.reset_peak()
        ids = torch.empty((rows, tokens), dtype=torch.long, device=device)
        mask = torch.ones_like(ids)
        output = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
        first = meter.peak - weights
        del output
        cache, longest = DynamicCache(config=text), tokens + new_tokens - 1
        heads, size = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
        for layer in range(text.num_hidden_layers):
            kept = [torch.empty(rows, heads, longest, size, dtype=torch.bfloat16, device=device) for _ in range(2)]
            cache.update(*kept, layer)
            del kept
        meter.reset_peak()
        ids, mask = ids[:, :1].clone(), torch.ones(rows, longest + 1, dtype=torch.long, device=device)
        model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        last = meter.peak - weights
    return {"planned": planned, "first": first, "last": last, "at": meter.peak_at}
