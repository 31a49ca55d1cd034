"""What the package does on a card outside a training step: answers, timing, the benchmark's sides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lora_llava.benchmark.benchmark_sides import BenchmarkSettings
from lora_llava.benchmark.comparison_run import _run
from lora_llava.model.fast_path.attention import resolve_attention
from lora_llava.model.weights.parts import DEMO_FOLDER
from lora_llava.model.weights.tensor_files import lazy_tensors
from lora_llava.planning.fit import describe_device, memory_budget
from lora_llava.planning.timing import time_row
from lora_llava.publishing.proof import stays_in_memory
from lora_llava.runs.directory import machine
from lora_llava.runs.state_files import random_state, set_random_state
from tests.simulation.meter import Meter
from tests.simulation.settings import SETTINGS, planned_step, recipe_of
from tests.simulation.simulated_step import on_card

GIB = 2**30


def run_branches(meters: list[Meter]) -> dict[str, Any]:
    """Return the answers on the card."""
    recipe = recipe_of(SETTINGS[0])
    free = recipe.model_copy(update={"training": recipe.training.model_copy(update={"memory_gb": "auto"})})
    found: dict[str, Any] = {
        "device": describe_device(),
        "machine": machine(),
        "budget": memory_budget(free),
        "padding_free": resolve_attention("auto", torch.bfloat16)[0],
        "stays": stays_in_memory(list(lazy_tensors(DEMO_FOLDER / "llm")), torch.bfloat16),
    }
    state = random_state()
    set_random_state(state)
    found["random"] = sorted(state)
    with on_card(Meter(100), meters):
        found["seconds"] = time_row(recipe, replace(planned_step(SETTINGS[0]), tokens=700))
    with on_card(Meter(100, limit=GIB // 2), meters):
        found["seconds_without_memory"] = time_row(recipe, planned_step(SETTINGS[0]))
    settings = BenchmarkSettings("ours_cached", "tiny", 2, 2, 1, 4, "adamw_torch", 2 * GIB, pool=2)
    for name, cap in (("fits", 2 * GIB), ("too_small", 2**20)):
        with on_card(Meter(100), meters):
            found[name] = _run(replace(settings, cap_bytes=cap))
    return found
