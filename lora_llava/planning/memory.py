"""The memory of a training step, computed from shapes, and the number of layers to checkpoint so that it fits.

All sizes are in bytes, and follow the modules named beside them. They have not been compared with a GPU yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import LlavaConfig

from lora_llava.core.quiet import has_expandable_segments
from lora_llava.distributed.ranks import this_rank
from lora_llava.model.families.decoder_shape import DecoderShape, attention_widths, decoder_shape, tower_parameters
from lora_llava.model.families.language_families import family_of
from lora_llava.model.families.tower_families import image_tokens, tiling_of, tower_of
from lora_llava.model.fast_path.host_weights import BUFFERS
from lora_llava.model.fast_path.trained_loss import tokens_at_once
from lora_llava.planning.trained_memory import (
    full_parameters,
    largest_eva_parameters,
    tower_bytes,
    vision_lora_parameters,
    vocabulary_parameters,
)
from lora_llava.recipe.schema import LoraSection

GIB = 2**30
CUDA_CONTEXT = 550_000_000
"""CUDA's context with cuBLAS; outside torch's allocator (0.4 to 0.6 GB in reports; not measured here)."""
PROCESS = 600_000_000
"""Python with torch, transformers and trl: the resident set after the imports, counted on a CPU."""
GPU_SHARE = 0.97
"""Usable share of a GPU's budget with expandable segments. In a replay of simulated 7B steps, allocated bytes were
0.989 and 0.994 of the pages that had a block in use. Not measured on a GPU."""
GPU_SHARE_OF_FIXED_SEGMENTS = 0.90
"""The same without them, as on Windows: freed blocks of other sizes cannot be joined across segments. In the replay,
allocated bytes were 0.918 and 0.930 of the segments that had a block in use."""
LOADING_SHARE, LOADING_SHARE_OF_FIXED_SEGMENTS = 0.98, 0.97
"""The same while NF4 weights are loaded, which frees few blocks, in a replay of 7B and 13B. Not measured on a GPU."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight: 4 bits, an 8-bit scale per 64 weights, a float32 scale per 256 scales (QLoRA, section 3)."""
PCIE_BYTES_PER_SECOND = 25e9
"""Copies from pinned memory over PCIe 4 x16: an assumption, 80% of its 31.5 GB/s; not measured."""


@dataclass(frozen=True)
class Step:
    """The properties of a training step that determine its memory.

    Attributes:
        config: Configuration of the LLaVA.
        quantization: `nf4` or `none`.
        dtype_bytes: Bytes of the compute dtype: 2 or 4.
        lora: The adapters; None in Stage 1.
        optimizer_bytes: Per trained parameter: 8 for AdamW's two float32 states, 2 for its 8-bit ones.
        tokens: Tokens of the longest row, padding included.
        trained_tokens: Most trained tokens of a row.
        images: Most tiles of the images of a row: for a model without tiles, most images.
        cached_features: Whether features are cached and the tower is not loaded.
        cuda: Whether it runs on a GPU.
        ranks: Processes over which the weights are sharded; 1 if each has all of them.
        checkpointed: Number of language model layers that are recomputed.
        offloaded: Whether the inputs of those layers are kept in host memory.
        new_tokens: Number of tokens whose rows of embeddings and head are trained.
        keys: Keys and values that attention reads in the row; None is `tokens`, more if samples share prefixes.
        by_sample: Whether attention runs sample by sample on a GPU, as it always does on a CPU.
        host_layers: Number of language model layers whose 4-bit weights are in host memory.
        fewer_tiles: See `Extremes`.
    """

    config: LlavaConfig
    quantization: str
    dtype_bytes: int
    lora: LoraSection | None
    optimizer_bytes: int
    tokens: int
    trained_tokens: int
    images: int
    cached_features: bool
    cuda: bool
    ranks: int = 1
    checkpointed: int = 0
    offloaded: bool = False
    new_tokens: int = 0
    keys: int | None = None
    by_sample: bool = False
    host_layers: int = 0
    fewer_tiles: tuple[tuple[int, int], ...] = ()

    @property
    def layers(self) -> int:
        return self.shape.layers

    @cached_property
    def shape(self) -> DecoderShape:
        """The language model's layers, from its stock modules."""
        return decoder_shape(self.config.text_config)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Input and output sizes of a layer's linear layers."""
        return {name: shapes[0] for name, shapes in self.shape.linears.items()}

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The linear layers with an adapter."""
        if self.lora is None:
            return ()
        return self.shape.check_targets(self.lora.targets, self.config.text_config.model_type)

    def parts(self) -> dict[str, int]:
        """Return the bytes of each part at the peak of a step, in the order of the table."""
        ranks = self.ranks
        weights = {
            "language model, " + ("NF4" if self.quantization == "nf4" else "unquantized"): self._linears() // ranks
            + self._extra_scales()
            - self.host_savings,
            "embeddings, head, norms": self._embeddings() // ranks,
            "vision tower": 0
            if self.cached_features
            else tower_parameters(self.config.vision_config) * self.dtype_bytes,
            "projector": projector_parameters(self.config) * (4 + self.dtype_bytes),  # peft keeps the base's beside it
            "LoRA": 4 * self.lora_parameters // ranks,
        } | ({"gathered weights": self._gathered()} if ranks > 1 else {})
        trained = self.lora_parameters + trained_projector_parameters(self.config) + self._other_parameters
        return (
            weights
            | self._other_weights()
            | {
                "16-bit copies of trained weights": self._autocast_copies(),
                "gradients": 4 * trained // ranks,
                "optimizer": self.optimizer_bytes * trained // ranks,
                "activations, kept": self.kept_bytes(),
                "one layer's working set": max(self._working_set(), self._head(), self._vision()),
                "dequantized weight": self._dequantized(),
                "CUDA context" if self.cuda else "Python and libraries": CUDA_CONTEXT if self.cuda else PROCESS,
            }
        )

    @property
    def peak(self) -> int:
        """Peak bytes of a step."""
        return sum(self.parts().values())

    @property
    def host_savings(self) -> int:
        """Bytes less on the device by weights in host memory, where two layers have a buffer (host_weights.py)."""
        return max(0, self.host_layers - BUFFERS) * self._host_bytes

    @property
    def copy_seconds(self) -> float:
        """Seconds to copy a layer's 4-bit weights to the device; computed."""
        return self._host_bytes / PCIE_BYTES_PER_SECOND

    @property
    def copies(self) -> int:
        """Layers copied in a forward and a backward pass; those in the buffers when a pass turns are not."""
        return 2 * max(0, self.host_layers - BUFFERS)

    @property
    def _host_bytes(self) -> int:
        """Bytes of a layer that are kept in host memory: packed weights and 8-bit scales."""
        return int(self.shape.weights * (0.5 + 1 / 64)) // self.layers

    @property
    def loading(self) -> int:
        """Peak bytes of loading 4-bit weights, before any are moved to host memory: all, and one matrix in 16 bits."""
        projector = projector_parameters(self.config) * self.dtype_bytes
        tower = 0 if self.cached_features else self._tower()
        return self._linears() + self._embeddings() + tower + projector + self._dequantized() + CUDA_CONTEXT

    @property
    def lora_parameters(self) -> int:
        if self.lora is None:
            return 0
        shapes = [shape for name in self.targets for shape in self.shape.linears[name]]
        if self.lora.init == "eva":
            return largest_eva_parameters(shapes, self.lora)
        extra = 1 if self.lora.dora else 0  # DoRA's magnitude, one value per output
        return sum(self.lora.r * (a + b) + extra * b for a, b in shapes)

    @property
    def _other_parameters(self) -> int:
        """Parameters that train besides the language model's adapters and the projector."""
        hidden = self.config.text_config.hidden_size
        newline = hidden if self.lora is None and tiling_of(self.config) is not None else 0
        in_full = full_parameters(self.config, self.lora)
        return int(vision_lora_parameters(self.config, self.lora) + in_full + 2 * self.new_tokens * hidden + newline)

    def _other_weights(self) -> dict[str, int]:
        """Bytes of what else trains, with the entries that a recipe needs."""
        found = {
            "LoRA of the vision tower": 4 * vision_lora_parameters(self.config, self.lora),
            "vision tower, kept": tower_bytes(self.config, self.lora, self.images, self.dtype_bytes, cuda=self.cuda),
            "embeddings, head in float32": 4 * full_parameters(self.config, self.lora),
            # peft copies both matrices with the new rows in every pass, and autograd keeps their complete gradients.
            "embeddings, head with new tokens": 4 * self.dtype_bytes * vocabulary_parameters(self.config)
            if self.new_tokens
            else 0,
        }
        return {part: size for part, size in found.items() if size}

    def _autocast_copies(self) -> int:
        """Bytes of 16-bit copies of LoRA and projector: autocast caches A, and layers not recomputed keep B."""
        if self.dtype_bytes == 4:
            return 0
        a_share = sum(a for a, _ in self.linear_shapes.values()) / sum(a + b for a, b in self.linear_shapes.values())
        kept = 1 - self.checkpointed / self.layers
        lora = self.lora_parameters * (a_share + (1 - a_share) * kept)
        head = vocabulary_parameters(self.config) if self.lora and "lm_head" in self.lora.modules_to_save else 0
        return int(2 * (lora + projector_parameters(self.config) + head))

    def _linears(self) -> int:
        return int(self.shape.weights * (NF4_BYTES if self.quantization == "nf4" else self.dtype_bytes))

    def _extra_scales(self) -> int:
        """Bytes of 4-bit scales on a rank beyond its share: scales are not parameters and are not sharded."""
        scales = int(self.shape.weights * (NF4_BYTES - 0.5)) if self.quantization == "nf4" else 0
        return scales - scales // self.ranks

    def _tower(self) -> int:
        return self.dtype_bytes * tower_parameters(self.config.vision_config)

    def _gathered(self) -> int:
        """Bytes of gathered weights: the present layer, the next one, and the matrix of the embeddings or the head."""
        text = self.config.text_config
        layer = self._linears() // self.layers + 4 * self.lora_parameters // self.layers
        return 2 * layer + self.dtype_bytes * text.vocab_size * text.hidden_size

    def _embeddings(self) -> int:
        """Bytes of everything in the language model that is not a linear layer's weight: biases, too."""
        text = self.config.text_config
        head = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
        return int(self.dtype_bytes * (self.shape.parameters - self.shape.weights + head))

    def layer_bytes(self) -> int:
        """Return the bytes that autograd keeps of a layer without recomputation, for all tokens (fast_path/lean.py)."""
        text, size = self.config.text_config, self.dtype_bytes
        hidden, inner = text.hidden_size, self._inner
        queries, keys = attention_widths(text)
        per_token = size * (self.shape.norm_values + 2 * queries + 2 * keys + 2 * inner)  # q, k, v, out; gate, up
        per_token += 4 * text.num_attention_heads  # attention's log-sum-exp
        if family_of(text) is None:  # stock norms keep float32 copies, stock MLPs the activation
            per_token += 2 * 4 * self.shape.norm_values + size * inner
        dropout = self.lora is not None and self.lora.dropout > 0
        if (self.by_sample or not self.cuda) and not dropout:
            per_token += size * queries  # the samples' outputs, concatenated for o_proj
        if self.by_sample:
            per_token += size * 2 * (queries - keys)  # keys and values, repeated for grouped heads
        if self.lora is not None:
            inputs = sum(self.linear_shapes[name][0] for name in self.targets)
            shared = 2 * hidden + inner  # norms' outputs and down_proj's input; attention's output is counted above
            mask = 1 if self.cuda else size
            per_token += (size + mask) * inputs if dropout else size * shared  # inputs after dropout, and the masks
            per_token += size * self.lora.r * len(self.targets)
        # Attention keeps the keys and values that it reads, in which a shared prefix is repeated for each branch.
        repeated = 2 * keys * size * (self.keys - self.tokens) if self.keys is not None else 0
        return per_token * self.tokens + repeated

    @property
    def _inner(self) -> int:
        """Width of the MLP."""
        text = self.config.text_config
        return int(getattr(text, "intermediate_size", None) or max(b for _, b in self.linear_shapes.values()))

    def kept_bytes(self) -> int:
        """Return the bytes kept between forward and backward pass, besides the layer being computed."""
        text, size = self.config.text_config, self.dtype_bytes
        entry = size * text.hidden_size * self.tokens
        projected = 2 * size * text.hidden_size * self._projected_patches()
        inputs_kept = min(self.checkpointed, 2) if self.offloaded else self.checkpointed
        if self.lora is None and not self.images:
            return 0
        layers = max(0, self.layers - self.checkpointed - 1) * self.layer_bytes()
        return entry * (inputs_kept + 1) + projected + layers

    def _projected_patches(self) -> int:
        """Return the patches for which the projector keeps two outputs: with tiles, padding included."""
        if tiling_of(self.config) is None:
            return self.tokens
        return max(self.tokens, self.images * image_tokens(self.config))

    def _working_set(self) -> int:
        """Bytes of one layer, and of the gradients of its MLP (4 wide and 4 narrow values per token)."""
        text = self.config.text_config
        transient = self.dtype_bytes * (4 * self._inner + 4 * text.hidden_size) * self.tokens
        return self.layer_bytes() + transient

    def _head(self) -> int:
        """Bytes of some tokens' log-softmax and its two gradients, and of all trained tokens' states and gradients."""
        text, rows = self.config.text_config, self.trained_tokens
        last = self.layer_bytes() if self.checkpointed < self.layers else 0
        at_once = min(rows, tokens_at_once(text.vocab_size))
        return last + 3 * 4 * at_once * text.vocab_size + 2 * self.dtype_bytes * rows * text.hidden_size

    def _vision(self) -> int:
        if self.cached_features or not self.images:
            return 0
        vision = self.config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2 + tower_of(self.config).class_tokens
        states = vision.num_hidden_layers + 1  # transformers before 5.20 keeps all of them
        return self.dtype_bytes * self.images * tokens * (states * vision.hidden_size + 2 * vision.intermediate_size)

    def _dequantized(self) -> int:
        """Bytes of the largest matrix, dequantized for one multiplication."""
        largest = max(a * b for a, b in self.linear_shapes.values())
        return largest * self.dtype_bytes if self.quantization == "nf4" else 0


def projector_parameters(config: LlavaConfig) -> int:
    """Return the number of parameters of the projector."""
    layers = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    hidden = config.text_config.hidden_size
    return int((width + 1) * hidden + (hidden + 1) * hidden)


def trained_projector_parameters(config: LlavaConfig) -> int:
    """Return the number of trained parameters of the projector; a linear one has a frozen identity layer."""
    hidden = config.text_config.hidden_size
    identity = (hidden + 1) * hidden if config.projector_hidden_act == "linear" else 0
    return projector_parameters(config) - int(identity)


def fit_step(step: Step, budget: int, *, in_host: bool = True) -> Step | None:
    """Return the fastest way to run a step that fits a budget: see `candidates` and `host_candidates`.

    Args:
        step: The step; its `checkpointed`, `offloaded` and `host_layers` are ignored.
        budget: Bytes; see `usable`.
        in_host: Whether weights may be in host memory.

    Returns:
        The step, or None if nothing fits.
    """
    ways = [*candidates(step), *(host_candidates(step) if in_host else ())]
    return next((way for way in ways if needed(way) <= budget), None)


def gpu_share() -> float:
    """Return the share of a GPU's budget that is not lost to fragmentation, with this process's allocator settings."""
    return GPU_SHARE if has_expandable_segments() else GPU_SHARE_OF_FIXED_SEGMENTS


def usable(step: Step, budget: int) -> int:
    """Return the usable part of a budget: on a GPU some is lost to fragmentation."""
    return int(budget * gpu_share()) if step.cuda else budget


def candidates(step: Step) -> list[Step]:
    """List the ways to run a step, fastest first. The last layer is never recomputed, as it is needed at once."""
    most = max(0, step.layers - 1)
    ways = [replace(step, checkpointed=count, offloaded=False, host_layers=0) for count in range(most + 1)]
    return [*ways, replace(ways[-1], offloaded=True)] if step.cuda else ways


def host_candidates(step: Step) -> list[Step]:
    """List the ways to run a step with 4-bit weights in host memory, fastest first.

    Only one process does so: several start by copying all weights from the first, also those that have no values yet.
    DoRA and LoftQ read the weights before training.
    """
    lora = step.lora
    reads_weights = lora is not None and (lora.dora or lora.init == "loftq")
    if not step.cuda or step.quantization != "nf4" or this_rank()[1] > 1 or reads_weights:
        return []
    last = candidates(step)[-1]
    return [replace(last, host_layers=count) for count in range(BUFFERS + 1, step.layers)]


def needed(step: Step) -> int:
    """Return the smallest budget, in bytes, in which a step runs as it is."""
    if not step.cuda:
        return step.peak
    least = math.ceil(step.peak / gpu_share())
    share = LOADING_SHARE if has_expandable_segments() else LOADING_SHARE_OF_FIXED_SEGMENTS
    return max(least, math.ceil(step.loading / share)) if step.host_layers else least


def smallest(step: Step) -> int:
    """Return the smallest budget, in bytes, in which a step fits."""
    return min(needed(way) for way in [*candidates(step), *host_candidates(step)])
