"""A training step of the real trainer on a card that is not there, and its peak."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlavaConfig, LlavaNextImageProcessorPil, TrainerCallback

from lora_llava.data.collator import PackedCollator
from lora_llava.model import loading
from lora_llava.model.base import build_processor
from lora_llava.model.families.tower_families import image_processor_of
from lora_llava.model.fast_path.activation_checkpointing import checkpoint_language_model
from lora_llava.model.fast_path.host_weights import BUFFERS
from lora_llava.model.random_weights import build_random_llava
from lora_llava.model.tokenizer import load_tokenizer
from lora_llava.model.weights.parts import DEMO_FOLDER
from lora_llava.planning.memory import CUDA_CONTEXT
from lora_llava.training import stages
from lora_llava.training.feed import Feed
from lora_llava.training.trainer import LlavaSFTTrainer
from tests.simulation.allocator import replay
from tests.simulation.fake_card import FakeMode
from tests.simulation.meter import Meter
from tests.simulation.settings import PREFIX, Setting, config_of, images_of, planned_step, recipe_of
from tests.simulation.stand_ins import EightBitAdamW


@dataclass
class Peaks:
    """Bytes of a run of one optimizer step of two passes.

    Attributes:
        second_pass: Peak of the second pass, with gradients and without the optimizer's states.
        states: The optimizer's states, which the first step makes.
        update: Peak of the clipping and of the optimizer's step.
        at: The operator at the peak of the second pass.
    """

    second_pass: int = 0
    states: int = 0
    update: int = 0
    at: str = ""

    @property
    def peak(self) -> int:
        """Peak of every later step, which has the states."""
        return max(self.second_pass + self.states, self.update)


class PeakOfSteps(TrainerCallback):
    """Reads the meter between the passes and the update.

    Args:
        meter: The meter.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter, self.peaks = meter, Peaks()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.meter.reset_peak()

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.meter.reset_peak()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.peaks.second_pass, self.peaks.at = self.meter.peak, self.meter.peak_at
        self.before = self.meter.total
        self.meter.reset_peak()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.peaks.states, self.peaks.update = self.meter.total - self.before, self.meter.peak


def batch_of(setting: Setting, config: LlavaConfig) -> dict[str, Any]:
    """Return a row on the card as the collator would give it."""
    tokens, device = setting.tokens, torch.device("cuda", 0)
    lengths = setting.segments
    ends = torch.empty(len(lengths) + 1, dtype=torch.int32, device=device)
    vision, images = config.vision_config, images_of(setting, config)
    if setting.cached:
        pixels = torch.empty(images, config.image_seq_length, vision.hidden_size, dtype=torch.bfloat16, device=device)
    else:
        pixels = torch.empty(images, 3, vision.image_size, vision.image_size, device=device)
    ids = {
        name: torch.empty((1, tokens), dtype=torch.long, device=device)
        for name in ("input_ids", "labels", "position_ids")
    }
    batch = {**ids, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "pixel_values": pixels}
    if setting.sizes:
        batch["image_sizes"] = _Sizes(setting.sizes)
    if setting.branches is None:
        return batch | {"max_length_k": max(lengths)}
    most_keys = PREFIX + setting.branches[1]
    return batch | {"max_length_k": most_keys, "segment_lengths": lengths, "key_segments": setting.key_segments}


class _Sizes(list[Any]):
    """Sizes of images, in place of a tensor, which would have no values."""

    def tolist(self) -> list[Any]:
        return list(self)


class _Trainer(LlavaSFTTrainer):
    """The project's trainer with rows that are made on the card, and no checkpoints."""

    rows: list[dict[str, Any]]

    def get_train_dataloader(self) -> Any:
        return self.rows

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        pass

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:  # type: ignore[override]
        if "8bit" in args.optim:
            return EightBitAdamW, {"lr": args.learning_rate}
        return super().get_optimizer_cls_and_kwargs(args, model)


@contextmanager
def on_card(meter: Meter, meters: list[Meter]) -> Iterator[None]:
    """Make tensors without bytes within a `with` block, and count them."""
    meters[:] = [meter]
    with FakeMode(), meter:
        yield
    meters.clear()


def build_trainer(setting: Setting, callback: TrainerCallback) -> _Trainer:
    """Build the trainer of a setting by the project's own functions; call it in `on_card`."""
    recipe, step = recipe_of(setting), planned_step(setting)
    tokenizer = load_tokenizer(DEMO_FOLDER / "llm")
    config = config_of(setting, len(tokenizer), int(tokenizer.convert_tokens_to_ids("<image>")))

    def load_base(base: Any, **options: Any) -> Any:
        return build_random_llava(
            config,
            quantization=options["quantization"],
            dtype=loading.resolve_dtype(options["dtype"]),
            device=loading.default_device(),
            with_tower=options["with_tower"],
        )

    stages.load_base = load_base
    base: Any = types.SimpleNamespace(name=None, revision=None, initial_projector=None, folder=DEMO_FOLDER / "llm")
    model = stages.build_trained_model(recipe, base, host_layers=step.host_layers)
    checkpoint_language_model(model.get_base_model(), step.checkpointed, step.offloaded)
    arguments = stages.training_arguments(recipe, 1, False, recipe.training.gradient_accumulation)
    arguments.dataloader_pin_memory = False
    pixels = LlavaNextImageProcessorPil() if setting.sizes else image_processor_of(DEMO_FOLDER / "none", config)
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "image_files": [], "row_id": "0"}
    trainer = _Trainer(
        model,
        arguments,
        train=Feed([row], [[0]] * 8, PackedCollator(None)),
        validation=None,
        processor=build_processor(tokenizer, config, pixels),
        rates=stages.learning_rates(recipe),
        callbacks=[callback],
    )
    trainer.rows = [batch_of(setting, config) for _ in range(2)]
    return trainer


def measure(setting: Setting, meters: list[Meter]) -> Peaks:
    """Train one step of two passes and return its peaks."""
    meter = Meter(setting.trained_tokens)
    callback = PeakOfSteps(meter)
    with on_card(meter, meters):
        trainer = build_trainer(setting, callback)
        trainer.train()
    return callback.peaks


def measure_whole(setting: Setting, meters: list[Meter]) -> dict[str, Any]:
    """Return plan and count of a setting with exactly its layers, in bytes without CUDA's context."""
    step, found = planned_step(setting), measure(setting, meters)
    return _result(setting, step, found.peak, found.at)


def measure_at_depth(setting: Setting, meters: list[Meter]) -> dict[str, Any]:
    """Return plan and count of a setting at full depth, from models of few layers.

    Layers are equal: each recomputed one and each kept one adds its own bytes, which the models with one more layer
    of a kind measure. The last layer is always kept.
    """
    step = planned_step(setting)
    recomputed, kept = step.checkpointed, step.layers - step.checkpointed

    def peak(c: int, k: int, host: int) -> Peaks:
        return measure(replace(setting, layers=c + k, recomputed=c, offload=step.offloaded, host=host), meters)

    host = min(step.host_layers, BUFFERS)  # more take no memory on the card
    c, k = min(recomputed, 2), min(kept, 2)
    base = peak(c, k, host)
    in_host = step.host_layers - host
    more = [(peak(c + 1, k, host), recomputed - c - in_host)] if recomputed > c else []
    more += [(peak(c, k + 1, host), kept - k)] if kept > k else []
    more += [(peak(c + 1, k, host + 1), in_host)] if in_host else []

    def whole(name: str) -> int:
        least = getattr(base, name)
        return int(least + sum((getattr(found, name) - least) * layers for found, layers in more))

    peaks = Peaks(whole("second_pass"), whole("states"), whole("update"), base.at)
    return _result(setting, step, peaks.peak, base.at)


def measure_fragments(setting: Setting, meters: list[Meter]) -> dict[str, Any]:
    """Return what the caching allocator holds for rows of several lengths, without and with expandable segments.

    The replay begins with the first weight and ends after an optimizer step of four passes.
    """
    meter = Meter(setting.trained_tokens)
    meter.record = True
    with on_card(meter, meters):
        trainer = build_trainer(setting, TrainerCallback())
        lengths = [int(share * setting.tokens) for share in (1, 0.91, 0.97, 0.83)]
        config = trainer.model.config
        trainer.rows = [batch_of(replace(setting, tokens=tokens), config) for tokens in lengths]
        trainer.args.gradient_accumulation_steps = trainer.accelerator.gradient_accumulation_steps = len(lengths)
        trainer.train()
    found = {str(expandable): replay(meter.events, expandable=expandable) for expandable in (False, True)}
    return {"name": setting.name, "events": len(meter.events), "peak_bytes": meter.peak} | {
        f"{'expandable' if name == 'True' else 'fixed'}_{part}": getattr(each, part)
        for name, each in found.items()
        for part in ("allocated", "reserved", "needed")
    }


def _result(setting: Setting, step: Any, counted: int, at: str) -> dict[str, Any]:
    planned = step.peak - CUDA_CONTEXT
    return {
        "name": setting.name,
        "layers": step.layers,
        "recomputed": step.checkpointed,
        "offloaded": step.offloaded,
        "host_layers": step.host_layers,
        "planned_bytes": planned,
        "counted_bytes": counted,
        "planned_over_counted": planned / counted,
        "at": at,
    }
