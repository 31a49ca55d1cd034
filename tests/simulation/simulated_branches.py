"""What the package does on a card besides a training step: answers about the device, timing, the benchmark's sides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lora_llava.benchmark import benchmark_sides
from lora_llava.benchmark.comparison_run import run_or_full
from lora_llava.inference.batches import free_bytes
from lora_llava.model.fast_path.attention import resolve_attention
from lora_llava.model.weights.parts import DEMO_FOLDER
from lora_llava.model.weights.tensor_files import lazy_tensors
from lora_llava.planning.memory_budget import describe_device, memory_budget
from lora_llava.planning.timing import time_row
from lora_llava.publishing.proof import stays_in_memory
from lora_llava.runs.directory import machine
from lora_llava.runs.state_files import random_state, set_random_state
from lora_llava.training.kernel_check import train_once
from tests.simulation.meter import Meter
from tests.simulation.settings import SETTINGS, planned_step, recipe_of
from tests.simulation.simulated_step import PeakOfSteps, batch_of, build_trainer, on_card
from tests.simulation.stand_ins import really

GIB = 2**30


def run_branches(meters: list[Meter]) -> dict[str, Any]:
    """Return what the package says and measures on the card."""
    return answers_of_the_device() | first_pass(meters) | timed_rows(meters) | benchmark_runs(meters)


def answers_of_the_device() -> dict[str, Any]:
    """Return what the package says of the card."""
    recipe = recipe_of(SETTINGS[0])
    free = recipe.model_copy(update={"training": recipe.training.model_copy(update={"memory_gb": "auto"})})
    state = random_state()
    set_random_state(state)
    return {
        "device": describe_device(),
        "machine": machine(),
        "budget": memory_budget(free),
        "padding_free": resolve_attention("auto", torch.bfloat16)[0],
        "stays": stays_in_memory(list(lazy_tensors(DEMO_FOLDER / "llm")), torch.bfloat16),
        "random": sorted(state),
        "for_answers": free_bytes(),
    }


def first_pass(meters: list[Meter]) -> dict[str, Any]:
    """Return loss and trained tensors of the pass by which kernels are compared at the start of a run."""
    setting = replace(SETTINGS[0], layers=1, recomputed=0, tokens=700)
    meter = Meter(100)
    with on_card(meter, meters):
        model = build_trainer(setting, PeakOfSteps(meter)).model
        loss, gradients = train_once(model, batch_of(setting, model.config))
    return {"first_loss": loss, "first_gradients": len(gradients)}


def timed_rows(meters: list[Meter]) -> dict[str, Any]:
    """Return the seconds of a step, and what is said where the card is too small to measure them."""
    recipe, step = recipe_of(SETTINGS[0]), replace(planned_step(SETTINGS[0]), tokens=700)
    found = {}
    for name, limit in (("seconds", None), ("seconds_without_memory", GIB // 8)):
        with on_card(Meter(100, limit=limit), meters):
            found[name] = time_row(recipe, step)
    return found


def benchmark_runs(meters: list[Meter]) -> dict[str, Any]:
    """Return a run of the benchmark that fits under its cap, and one that cannot."""
    benchmark_sides.lay_out = really(benchmark_sides.lay_out)
    settings = benchmark_sides.BenchmarkSettings("ours_cached", "tiny", 2, 2, 1, 4, "adamw_torch", 2 * GIB, pool=2)
    found = {}
    for name, cap in (("fits", 2 * GIB), ("too_small", 2**20)):
        with on_card(Meter(100), meters):
            found[name] = run_or_full(replace(settings, cap_bytes=cap))
    return found
