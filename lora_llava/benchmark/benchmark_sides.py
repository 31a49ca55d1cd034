"""The sides of the benchmark: this package and TRL, with the same model, rows and samples per step."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextImageProcessorPil,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from lora_llava.benchmark.benchmark_rows import TILES, DrawnImages, draw_rows, lay_out, row_length, shape_config
from lora_llava.core.device import free_memory
from lora_llava.data.collator import PackedCollator
from lora_llava.data.conversation import Conversation
from lora_llava.data.images.image_id import own_names
from lora_llava.data.images.image_sources import Pixels
from lora_llava.data.images.tiling import TiledImages
from lora_llava.data.packed_rows.shared_prefixes import SharedSamples, find_prefixes
from lora_llava.data.selection import build_rows
from lora_llava.data.templates.named_templates import Template, chat_template, get_template
from lora_llava.model.adapters import add_adapters, lora_config
from lora_llava.model.base import build_processor
from lora_llava.model.families.image_counts import Sizes
from lora_llava.model.families.tower_families import image_processor_of, image_tokens, tiling_of, tokens_of_image
from lora_llava.model.fast_path.activation_checkpointing import checkpoint_language_model
from lora_llava.model.fast_path.attention import use_flash_varlen
from lora_llava.model.fast_path.host_weights import keep_in_host_memory
from lora_llava.model.fast_path.lean import make_lean
from lora_llava.model.fast_path.liger import use_liger
from lora_llava.model.loading import default_device, resolve_dtype
from lora_llava.model.random_weights import build_random_llava
from lora_llava.model.tokenizer import load_tokenizer
from lora_llava.model.vision import run_tower, tower_features
from lora_llava.model.vision_cache import CachedFeatures, FeatureStore
from lora_llava.model.weights.parts import DEMO_FOLDER
from lora_llava.planning.fit import Extremes, measure_rows
from lora_llava.planning.memory import CUDA_CONTEXT, Step, fit_step, smallest
from lora_llava.recipe.schema import LINEARS, LoraSection
from lora_llava.training.feed import Feed
from lora_llava.training.parameter_groups import Rates
from lora_llava.training.trainer import LlavaSFTTrainer
from lora_llava.training.trainer_arguments import checkpointing_argument
from lora_llava.training.training_progress import peak_memory_bytes, peak_reserved_bytes

SIDES = ("ours", "ours_cached", "trl_random", "trl_grouped")


@dataclass(frozen=True)
class BenchmarkSettings:
    """The settings of one run of one side.

    Attributes:
        side: One of `SIDES`.
        shape: One of `SHAPES`.
        batch_size: Samples per optimizer step.
        micro_batch: Samples per forward pass.
        steps: Timed steps, after one untimed step.
        r: Rank of the adapters.
        optimizer: transformers' name of the optimizer.
        cap_bytes: Cap on GPU memory in bytes; None for no cap.
        words: Text length of every row, each with an image; None for ScienceQA's lengths.
        questions: Rows about each image, side by side; with several, ours computes each image once.
        seed: Seed of rows and weights.
        pool: Number of batches to draw rows for, of which `steps` are trained.
        liger: Whether Liger's kernels are used; TRL's way is `use_liger_kernel`.
    """

    side: str
    shape: str
    batch_size: int
    micro_batch: int
    steps: int
    r: int
    optimizer: str
    cap_bytes: int | None
    words: int | None = None
    questions: int = 1
    seed: int = 0
    pool: int = 200
    liger: bool = False


class Clock(TrainerCallback):
    """A callback that times the steps after the first, and counts their real tokens."""

    def __init__(self) -> None:
        self.start = self.seconds = 0.0
        self.tokens = self.first_tokens = 0
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if state.global_step == 1:
            self.start, self.first_tokens = now, self.tokens
        self.seconds = now - self.start

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def run_side(settings: BenchmarkSettings) -> dict[str, Any]:
    """Train some steps and measure speed and memory.

    Returns:
        `name`, `real_tokens_per_second`, `samples_per_second`, `peak_memory_bytes`, `peak_reserved_bytes` (None without
        a GPU), `seconds`, `real_tokens`, `losses`, and details of the side.
    """
    if settings.cap_bytes is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(settings.cap_bytes / total)
    torch.manual_seed(settings.seed)
    tokenizer = load_tokenizer(DEMO_FOLDER / "llm")
    image_token = int(tokenizer.convert_tokens_to_ids("<image>"))
    config = shape_config(settings.shape, len(tokenizer), image_token)
    template = chat_template(_template())
    pixels = _image_processor(config)
    processor = build_processor(tokenizer, config, pixels, template)
    clock = Clock()
    build = _ours if settings.side.startswith("ours") else _trl
    trainer, details = build(settings, config, processor, clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    tokens = clock.tokens - clock.first_tokens
    return {
        "name": settings.side,
        "real_tokens_per_second": tokens / clock.seconds,
        "samples_per_second": settings.steps * settings.batch_size / clock.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_reserved_bytes": peak_reserved_bytes(),
        "seconds": clock.seconds,
        "real_tokens": tokens,
        "losses": clock.losses,
        "micro_batch": settings.micro_batch,
        **details,
    }


def _image_processor(config: LlavaConfig) -> Any:
    if tiling_of(config) is None:
        return image_processor_of(DEMO_FOLDER / "none", config)
    side = config.vision_config.image_size
    return LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _template() -> Template:
    """Return Vicuna's template without the system prompt, which has far more tokens in the demo's tokenizer."""
    return get_template("vicuna_v1", "")


def _batches(settings: BenchmarkSettings, config: LlavaConfig, images: DrawnImages) -> list[list[Conversation]]:
    """Return the batches of a run: the same samples for every side, grouped by length for `trl_grouped`."""
    size = settings.batch_size
    if settings.questions > 1:
        pool = draw_rows((settings.steps + 1) * size, settings.seed, settings.words, settings.questions)
        return [pool[start : start + size] for start in range(0, len(pool), size)]
    pool = draw_rows(max(settings.steps, settings.pool) * size, settings.seed, settings.words)
    counts = _tokens_of_images(config, images, [name for row in pool for name in own_names(row.images)])
    lengths = [row_length(row, [counts[name] for name in own_names(row.images)]) for row in pool]
    grouped, shuffled = lay_out(lengths, size, settings.steps, settings.seed)
    chosen = grouped if settings.side == "trl_grouped" else shuffled
    return [[pool[i] for i in batch] for batch in chosen]


def _tokens_of_images(config: LlavaConfig, images: DrawnImages, names: list[str]) -> dict[Any, int]:
    return {name: tokens_of_image(config, size) for name, size in images.sizes(names).items()}


def _random_model(
    settings: BenchmarkSettings, config: LlavaConfig, with_tower: bool = True
) -> LlavaForConditionalGeneration:
    cuda = torch.cuda.is_available()
    return build_random_llava(
        config,
        quantization="nf4" if cuda else "none",
        dtype=resolve_dtype("auto"),
        device=default_device(),
        seed=settings.seed,
        with_tower=with_tower,
    )


def _arguments(settings: BenchmarkSettings, **own: Any) -> SFTConfig:
    cuda, dtype = torch.cuda.is_available(), resolve_dtype("auto")
    return SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="lora_llava_benchmark_"),
        seed=settings.seed,
        max_steps=settings.steps + 1,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch,
        learning_rate=1e-4,
        optim=settings.optimizer,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not cuda,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        max_length=None,
        dataloader_pin_memory=cuda,
        **own,
    )


def _ours(settings: BenchmarkSettings, config: LlavaConfig, processor: Any, clock: Clock) -> tuple[Any, dict[str, Any]]:
    cached = settings.side == "ours_cached"
    drawn = DrawnImages(settings.shape == TILES)
    conversations = [row for batch in _batches(settings, config, drawn) for row in batch]
    names = [name for row in conversations for name in own_names(row.images)]
    tiling = tiling_of(config)
    samples, _ = build_rows(
        conversations,
        tokenizer=processor.tokenizer,
        template=_template(),
        num_image_tokens=image_tokens(config) if tiling is None else TiledImages(tiling, drawn.sizes(names)),
        max_length=8192,
    )
    indices, size = list(range(len(samples))), settings.micro_batch
    rows = [indices[start : start + size] for start in range(0, len(indices), size)]
    images: Any = Pixels(drawn, processor.image_processor)
    if cached:
        images = _features(config, images, drawn.sizes(names))
    model = _random_model(settings, config, with_tower=not cached)
    use_flash_varlen(model)
    peft_model = add_adapters(model, lora_config(r=settings.r, alpha=16, targets=LINEARS))
    if not cached:
        run_tower(model)
    make_lean(model.model.language_model)
    if settings.liger:
        use_liger(model.model.language_model)
    pixels = {name: str(name) for i in indices for name in samples.image_files(i)}  # no image is a copy of another
    shared = find_prefixes(samples, pixels) if settings.questions > 1 else None
    step = _planned(settings, config, measure_rows(rows, samples, padded=False, shared=shared), cached)
    keep_in_host_memory(model.model.language_model, step.host_layers)
    checkpoint_language_model(model, step.checkpointed, step.offloaded)
    arguments = _arguments(
        settings,
        **{checkpointing_argument(): False},
        packing=False,
        padding_free=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = CountingTrainer(
        peft_model,
        arguments,
        train=Feed(samples if shared is None else SharedSamples(samples, shared), rows, PackedCollator(images)),
        validation=None,
        processor=processor,
        rates=Rates(adapters=arguments.learning_rate, projector=1e-4),
        callbacks=[clock],
    )
    trainer.clock = clock
    return trainer, {"checkpointed_layers": step.checkpointed, "planned_bytes": step.peak}


class CountingTrainer(LlavaSFTTrainer):
    """This package's trainer, which reports its tokens to the clock."""

    clock: Clock

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.clock.tokens += inputs["input_ids"].numel()
        return super().compute_loss(model, inputs, *args, **kwargs)


def _features(config: LlavaConfig, pixels: Pixels, sizes: Sizes) -> CachedFeatures:
    """Compute the features of every image before the clock starts, as a vision cache does."""
    device, tiled = default_device(), tiling_of(config) is not None
    tower = AutoModel.from_config(config.vision_config, dtype=resolve_dtype("auto")).to(device).eval()
    store = FeatureStore(None, {})
    for name in sizes:
        features = tower_features(tower, config, pixels([name]).to(device))
        store.put(str(name), features if tiled else features[0])
    del tower
    free_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return CachedFeatures(store, {name: str(name) for name in sizes}, sizes if tiled else None)


def _planned(settings: BenchmarkSettings, config: LlavaConfig, extremes: Extremes, cached: bool) -> Step:
    """Plan the step with the least recomputation that fits under the cap; without a cap, with none."""
    cuda = torch.cuda.is_available()
    step = Step(
        config=config,
        quantization="nf4" if cuda else "none",
        dtype_bytes=2 if cuda else 4,
        lora=LoraSection(r=settings.r),
        optimizer_bytes=2 if "8bit" in settings.optimizer else 8,
        tokens=extremes.tokens,
        trained_tokens=extremes.trained_tokens,
        images=extremes.images,
        keys=extremes.keys,
        cached_features=cached,
        cuda=cuda,
    )
    budget = None if settings.cap_bytes is None else settings.cap_bytes + CUDA_CONTEXT
    fitting = fit_step(step, budget) if budget is not None else step
    if fitting is None:
        raise torch.cuda.OutOfMemoryError(f"the plan needs at least {smallest(step)} bytes, over the cap of {budget}")
    return fitting


def _trl(settings: BenchmarkSettings, config: LlavaConfig, processor: Any, clock: Clock) -> tuple[Any, dict[str, Any]]:
    """Set TRL up as in its documentation: its VLM collator on prompts and completions, peft_config and defaults."""
    images = DrawnImages(settings.shape == TILES)
    conversations = [row for batch in _batches(settings, config, images) for row in batch]
    dataset = Dataset.from_list(
        [
            {
                "images": [{"bytes": images.read(name), "path": None} for name in own_names(row.images)],
                "prompt": [{"role": "user", "content": row.turns[0].text.replace("<image>\n", "")}],
                "completion": [{"role": "assistant", "content": row.turns[1].text}],
            }
            for row in conversations
        ]
    ).cast_column("images", datasets.List(datasets.Image()))
    targets = lora_config(r=settings.r, targets=LINEARS).target_modules
    adapters = LoraConfig(
        r=settings.r,
        lora_alpha=16,
        target_modules=targets,
        modules_to_save=["multi_modal_projector"],
        task_type="CAUSAL_LM",
    )
    processor.chat_template = "{{ bos_token + ' ' }}" + processor.chat_template  # TRL's collator adds no tokens itself
    order = {"train_sampling_strategy": "sequential"}  # of our batches
    arguments = _arguments(settings, use_liger_kernel=settings.liger, **order)
    trainer = CountingTrl(
        model=_random_model(settings, config),
        args=arguments,
        train_dataset=dataset,
        processing_class=processor,
        peft_config=adapters,
        callbacks=[clock],
    )
    trainer.clock = clock
    return trainer, {"checkpointed_layers": config.text_config.num_hidden_layers}


class CountingTrl(SFTTrainer):
    """TRL's trainer, which reports its real tokens to the clock."""

    clock: Clock

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.clock.tokens += int(inputs["attention_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)
