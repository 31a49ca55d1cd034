"""TRL's own way, as the benchmark sets it up, on a card that is not there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lora_llava.benchmark import benchmark_sides
from lora_llava.benchmark.benchmark_rows import DrawnImages
from lora_llava.model.base import build_processor
from lora_llava.model.families.tower_families import image_processor_of
from lora_llava.model.tokenizer import load_tokenizer
from lora_llava.model.weights.parts import DEMO_FOLDER
from tests.simulation.meter import Meter
from tests.simulation.settings import Setting, config_of, images_of
from tests.simulation.simulated_step import PeakOfSteps, Peaks, on_card


def measure_trl(setting: Setting, meters: list[Meter]) -> dict[str, Any]:
    """Return the count of TRL's step at full depth, in bytes without CUDA's context.

    It pads: a row of the setting becomes as many samples as it has images, each of the same length. Every layer is
    recomputed, as TRL's default is.
    """
    layers = config_of(setting).text_config.num_hidden_layers
    few, more = (_peaks(replace(setting, layers=count), meters) for count in (2, 3))
    each = {name: getattr(more, name) - getattr(few, name) for name in ("second_pass", "states", "update")}
    whole = Peaks(**{name: getattr(few, name) + size * (layers - 2) for name, size in each.items()}, at=few.at)
    return {"name": setting.name, "layers": layers, "counted_bytes": whole.peak, "at": whole.at}


def _peaks(setting: Setting, meters: list[Meter]) -> Peaks:
    tokenizer = load_tokenizer(DEMO_FOLDER / "llm")
    config = config_of(setting, len(tokenizer), int(tokenizer.convert_tokens_to_ids("<image>")))
    batch = images_of(setting, config)
    settings = benchmark_sides.BenchmarkSettings(
        side="trl_random",
        shape="7b",
        batch_size=2 * batch,
        micro_batch=batch,
        steps=0,
        r=setting.r,
        optimizer="adamw_torch",
        cap_bytes=None,
        words=100,
        pool=1,
    )
    template = benchmark_sides.chat_template(benchmark_sides._template())
    processor = build_processor(tokenizer, config, image_processor_of(DEMO_FOLDER / "none", config), template)
    meter = Meter(setting.trained_tokens)
    callback: Any = PeakOfSteps(meter)
    callback.tokens = 0  # as the benchmark's clock has
    rows = benchmark_sides._batches(settings, config, DrawnImages())  # real: they are drawn with torch
    benchmark_sides._batches = lambda *_: rows
    with on_card(meter, meters):
        trainer, _ = benchmark_sides._trl(settings, config, processor, callback)
        trainer.args.dataloader_pin_memory = False
        trainer.get_train_dataloader = lambda: [_padded(setting, config, batch) for _ in range(2)]
        trainer.train()
    return callback.peaks


def _padded(setting: Setting, config: Any, batch: int) -> dict[str, torch.Tensor]:
    device, size = torch.device("cuda", 0), config.vision_config.image_size
    ids = {
        name: torch.empty((batch, setting.tokens // batch), dtype=torch.long, device=device)
        for name in ("input_ids", "labels", "attention_mask")
    }
    return {**ids, "pixel_values": torch.empty((batch, 3, size, size), device=device)}
