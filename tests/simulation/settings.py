"""The settings that are simulated: models, recipes and the heaviest row of each."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, LlavaConfig, LlavaNextConfig

from lora_llava.benchmark.benchmark_rows import shape_config
from lora_llava.model.families.tower_families import tiling_of
from lora_llava.planning.fit import Extremes, build_step, choose_checkpointing
from lora_llava.planning.memory import Step, candidates
from lora_llava.recipe import Recipe, load_recipe
from lora_llava.recipe.schema import HighResolution, VisionLoraSection

RECIPES = Path(__file__).parents[2] / "recipes"
CARD = 32 * 2**30
"""Bytes of the card, as many as the largest setting needs."""
EIGHT_BIT = "paged_adamw_8bit"
FUSED_LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""Phi-3's linear layers."""
PREFIX = 582
"""Tokens of a prompt's beginning with an image."""
_MEAN_SAMPLE = 615
"""Tokens of ScienceQA's mean row."""


@dataclass(frozen=True)
class Setting:
    """A training step on a card.

    Attributes:
        name: For the table.
        memory_gb: The planner's budget, CUDA's context included.
        shape: `7b` or `13b` for Vicuna, or one of `FAMILIES`.
        r: Rank of the adapters.
        tokens: Tokens of a row.
        cached: Whether features are cached and the tower is not loaded.
        optimizer: As in a recipe.
        quantization: As in a recipe.
        dropout: Of the adapters.
        trained: Share of the tokens that have a label.
        images: Images of a row; None is as many as fit with 100 tokens of text each.
        stage: 1 trains the projector only.
        offload: Recompute as much as possible with inputs in host memory, whatever the budget.
        layers: Layers of the language model; None is all that the shape has.
        recomputed: Layers that are recomputed; None is the planner's choice.
        host: Layers whose weights are in host memory, if `recomputed` is set.
        branches: Samples that share each image of the row, and the tokens of each behind `PREFIX`; None: no prefix.
        sizes: Height and width of a row's images, for a LLaVA-1.6; empty for a LLaVA-1.5.
        vision: Rank of the tower's adapters; None for none.
    """

    name: str
    memory_gb: float = 24
    shape: str = "7b"
    r: int = 16
    tokens: int = 2048
    cached: bool = True
    optimizer: str = "adamw_torch"
    quantization: str = "nf4"
    dropout: float = 0.0
    trained: float = 0.35
    images: int | None = None
    stage: int = 2
    offload: bool = False
    layers: int | None = None
    recomputed: int | None = None
    host: int = 0
    branches: tuple[int, int] | None = None
    sizes: Sequence[Sequence[int]] = ()
    vision: int | None = None

    @property
    def segments(self) -> list[int]:
        """Tokens of each sample, or, with branches, of each prefix and its branches."""
        if self.branches is None:
            samples = max(1, self.tokens // _MEAN_SAMPLE)
            return [self.tokens // samples] * samples
        questions, own = self.branches
        return [PREFIX, *[own] * questions] * (self.tokens // (PREFIX + questions * own))

    @property
    def key_segments(self) -> list[int]:
        """The segments whose keys are read, in order: each branch reads its prefix and itself."""
        if self.branches is None:
            return list(range(len(self.segments)))
        whole = 1 + self.branches[0]
        read = [[own] if own % whole == 0 else [own - own % whole, own] for own in range(len(self.segments))]
        return [segment for each in read for segment in each]

    @property
    def trained_tokens(self) -> int:
        """Tokens of a row that have a label."""
        return int(self.trained * self.tokens)


SETTINGS = [
    Setting("7B r16 2048 cached, 8 GB", 7.7),
    Setting("7B r16 2048 cached, 24 GB", 24),
    Setting("7B r16 2048 cached, offloaded", offload=True),
    Setting("7B r16 2048 tower, 12 GB", 11.7, cached=False),
    Setting("7B r16 4096 tower, 16 GB", 15.7, tokens=4096, cached=False),
    Setting("7B r64 8-bit 2048 cached dropout, 16 GB", 15.7, r=64, optimizer=EIGHT_BIT, dropout=0.05),
    Setting("7B r64 4096 cached, 24 GB", 23.7, r=64, tokens=4096),
    Setting("7B r64 8-bit 4096 tower, 24 GB", 23.7, r=64, tokens=4096, cached=False, optimizer=EIGHT_BIT),
    Setting("7B bf16 r64 8-bit 2048 tower, 32 GB", 31.7, r=64, cached=False, optimizer=EIGHT_BIT, quantization="none"),
    Setting("7B Stage 1 4096 tower, 24 GB", 23.7, tokens=4096, cached=False, stage=1),
    Setting("13B r16 2048 cached, 16 GB", 15.7, shape="13b"),
    Setting("13B r64 8-bit 4096 tower, 24 GB", 23.7, shape="13b", r=64, tokens=4096, cached=False, optimizer=EIGHT_BIT),
]

IN_HOST_MEMORY = [
    Setting("7B r16 8-bit 1024 cached, weights in host memory", 4.8, tokens=1024, optimizer=EIGHT_BIT),
    Setting("13B r16 8-bit 1024 cached, weights in host memory", 7.6, shape="13b", tokens=1024, optimizer=EIGHT_BIT),
]
"""Settings whose budget only weights in host memory can meet."""

SHARED = [
    Setting("10 samples, one to an image", tokens=6620, images=10, trained=0.0805, recomputed=16),
    Setting("10 samples, two to an image", tokens=3710, images=5, trained=0.1437, recomputed=16, branches=(2, 80)),
    Setting("10 samples, five to an image", tokens=1964, images=2, trained=0.2714, recomputed=16, branches=(5, 80)),
]
"""The same samples of 662 tokens, 533 labels in all, in one row of a 7B model; half of its layers are recomputed."""
TILED = [
    Setting("7B 1.6 r16 3072 cached, 8 GB", 7.7, tokens=3072, sizes=[(672, 672)]),
    Setting("7B 1.6 r16 3072 tower, 12 GB", 11.7, tokens=3072, cached=False, sizes=[(672, 672)]),
    Setting(
        "7B 1.6 r64 8-bit 4096 tower, 24 GB",
        23.7,
        r=64,
        tokens=4096,
        cached=False,
        optimizer=EIGHT_BIT,
        sizes=[(672, 672)],
    ),
    Setting("7B 1.6 r16 slivers cached, 12 GB", 11.7, tokens=6144, sizes=[(1, 2000)] * 8),
    Setting("7B 1.6 r16 3072 tower r8, 16 GB", 15.7, tokens=3072, cached=False, sizes=[(672, 672)], vision=8),
    Setting("7B 1.6 Stage 1 4096 tower, 24 GB", 23.7, tokens=4096, cached=False, sizes=[(672, 672)], stage=1),
]
"""LLaVA-1.6 with images of 2,928 tokens in five tiles, and with slivers, of whose patches most are padding."""
GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""LLaVA-1.6's canvases (config.json of llava-hf/llava-v1.6-vicuna-7b-hf)."""

FAMILIES: dict[str, dict[str, Any]] = {
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32768,
        "sliding_window": None,
    },
    "qwen2-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "phi3-mini": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "pad_token_id": None,
    },
    "gemma3-4b": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window": 1024,
        "tie_word_embeddings": True,
    },
}
"""The published config.json of a language model of each family, as far as memory depends on it."""


def config_of(setting: Setting, vocabulary: int = 1000, image_token: int = 5) -> LlavaConfig:
    """Return the LLaVA's configuration, with the setting's number of layers."""
    family = FAMILIES.get(setting.shape)
    config = shape_config("7b" if family else setting.shape, vocabulary, image_token)
    if family:
        options = {name: value for name, value in family.items() if name != "model_type"}
        config.text_config = CONFIG_MAPPING[family["model_type"]](**options)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings
    if setting.layers is not None:
        config.text_config.num_hidden_layers = setting.layers
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = config.text_config.layer_types[: setting.layers]
    if setting.sizes:
        content = {name: getattr(config, name) for name in ("text_config", "vision_config", "image_seq_length")}
        index = config.image_token_index
        return LlavaNextConfig(**content, image_token_index=index, image_grid_pinpoints=GRID)  # type: ignore[return-value]
    return config


def recipe_of(setting: Setting) -> Recipe:
    """Return the shipped recipe of the stage, with the setting's values."""
    recipe = load_recipe(RECIPES / ("align.yaml" if setting.stage == 1 else "scienceqa_qlora.yaml"))
    training = {
        "memory_gb": setting.memory_gb,
        "report_to": (),
        "workers": 0,
        "log_every": 1,
        "gradient_accumulation": 2,
        "optimizer": setting.optimizer,
        "vision_cache": "disk" if setting.cached else "off",
    }
    if setting.stage == 2:
        training["max_tokens_per_row"] = setting.tokens
    update: dict[str, Any] = {
        "output_dir": str(Path(tempfile.gettempdir(), "lora_llava_simulated_run")),
        "training": recipe.training.model_copy(update=training),
        "model": recipe.model.model_copy(update={"quantization": setting.quantization}),
    }
    if setting.sizes and setting.stage == 1:
        update["model"] = update["model"].model_copy(update={"high_resolution": HighResolution()})
    if recipe.lora is not None:
        targets = FUSED_LINEARS if setting.shape == "phi3-mini" else recipe.lora.targets
        vision = None if setting.vision is None else VisionLoraSection(r=setting.vision)
        lora = {"r": setting.r, "dropout": setting.dropout, "targets": targets, "vision": vision}
        update["lora"] = recipe.lora.model_copy(update=lora)
    return recipe.model_copy(update=update)


def images_of(setting: Setting, config: LlavaConfig) -> int:
    """Return the images of a row; for a LLaVA-1.6 their tiles."""
    tiling = tiling_of(config)
    if tiling is not None:
        return sum(tiling.tiles((height, width)) for height, width in setting.sizes)
    return setting.images or max(1, setting.tokens // (config.image_seq_length + 100))


def planned_step(setting: Setting) -> Step:
    """Return the planner's step for a setting.

    Raises:
        UserError: If it does not fit the budget.
    """
    recipe, config = recipe_of(setting), config_of(setting)
    keys = sum(setting.segments[read] for read in setting.key_segments) if setting.branches else None
    extremes = Extremes(setting.tokens, setting.trained_tokens, images_of(setting, config), keys)
    step = build_step(recipe, config, extremes, cuda=True)
    if setting.recomputed is not None:
        return replace(step, checkpointed=setting.recomputed, offloaded=setting.offload, host_layers=setting.host)
    return candidates(step)[-1] if setting.offload else choose_checkpointing(recipe, step)
