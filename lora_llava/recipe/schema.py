"""The schema of a recipe. Every section is strict: no unknown key, no silent conversion."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lora_llava.recipe.data_schema import DataSection
from lora_llava.recipe.section import Fraction, InputName, InputPath, NotNegative, OutputPath, Positive, Section

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama block (transformers, models/llama/modeling_llama.py)."""
VisionLinear = Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
VISION_LINEARS: tuple[VisionLinear, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""The linear layers of a CLIP block (transformers, models/clip/modeling_clip.py)."""
REFUSED_INITS = {
    "pissa": "it needs a decomposition of the unquantized weights, which 4-bit weights do not have, and rewrites the "
    "base's weights, so that the adapter would belong to a base that nobody has",
    "olora": "it rewrites the base's weights, so that the adapter would belong to a base that nobody has",
}
"""Initializations of peft that are not offered, each with the reason."""


ORIGINS = ("stage1_run", "stage1_recipe", "projector", "llava", "untrained")
"""Keys of `start_from` that say where a base's projector is from; a recipe has one of them."""


class StartFrom(Section):
    """Source of the projector's weights: exactly one of these; with `run`, the others may be left out."""

    run: InputPath | None = None
    """A finished Stage 2 run whose adapter and projector are trained on. Base, adapter settings, template and system
    text are the run's and may be left out; its held-out rows stay held out, and images that it trained are not held
    out."""
    stage1_run: InputPath | None = None
    """A run directory of Stage 1."""
    stage1_recipe: InputPath | None = None
    """A Stage 1 recipe, beside this one; it is run first if its result does not exist."""
    projector: InputName | None = None
    """LLaVA's `mm_projector.bin`: a file, or a Hub id that holds one."""
    projector_revision: str | None = None
    """Branch, tag or commit of `projector`."""
    llava: InputName | None = None
    """A complete LLaVA: a folder, or a Hub id such as llava-hf/llava-1.5-7b-hf."""
    llava_revision: str | None = None
    """Branch, tag or commit of `llava`."""
    untrained: Literal[True] | None = None
    """A new projector, initialised with the recipe's seed."""

    @model_validator(mode="after")
    def _exactly_one(self) -> StartFrom:
        given = [name for name in ORIGINS if getattr(self, name) is not None]
        if len(given) > 1 or not (given or self.run):
            raise ValueError(f"give exactly one of run, {', '.join(ORIGINS)}; given: {', '.join(given) or 'none'}")
        return self


NewToken = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^\S+$")]
"""A token to add: text without spaces."""


Canvas = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)]


class HighResolution(Section):
    """LLaVA-1.6 made of parts: an image is seen as a whole, and cut into tiles of the tower's size."""

    grid: Annotated[tuple[Canvas, ...], Field(min_length=1, strict=False)] | None = None
    """Canvases on which an image is cut, each a height and a width in pixels, multiples of the tower's image size. Null
    is LLaVA-1.6's: 1 x 2, 2 x 1, 2 x 2, 3 x 1 and 1 x 3 tiles."""

    @field_validator("grid")
    @classmethod
    def _canvases(cls, grid: tuple[Canvas, ...] | None) -> tuple[Canvas, ...] | None:
        for canvas in grid or ():
            if len(canvas) != 2:
                raise ValueError(f"the canvas {list(canvas)} has to be a height and a width, such as [336, 672]")
            if (grid or ()).count(canvas) > 1:
                raise ValueError(f"the canvas {list(canvas)} is named twice; keep one")
        return grid


class ModelSection(Section):
    """The parts of the LLaVA model and how they are loaded."""

    llm: InputName | None = None
    """The language model: `demo`, `smollm2`, a folder, or a Hub id. Not with `start_from.llava`; with `start_from.run`
    the run's."""
    llm_revision: str | None = None
    """Branch, tag or commit of `llm`."""
    vision_tower: InputName | None = None
    """The vision tower, a CLIP or SigLIP: `demo`, a folder, or a Hub id. Not with `start_from.llava`; with
    `start_from.run` the run's."""
    vision_tower_revision: str | None = None
    """Branch, tag or commit of `vision_tower`."""
    projector_type: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"
    """Two layers with GELU (LLaVA-1.5), or the matrix W of the first LLaVA."""
    start_from: StartFrom
    """Source of the projector's weights."""
    quantization: Literal["nf4", "none"] = "nf4"
    """NF4 with double quantisation for the language model's linear layers (QLoRA), or none (LoRA)."""
    attention: Literal["auto", "flash_varlen", "sdpa"] = "auto"
    """`flash_varlen` trains on rows without padding, with flash_attn or torch's kernel on a GPU and sample by sample on
    a CPU; `sdpa` pads; auto is flash_varlen wherever it runs."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type of the computation; auto is bfloat16 on a GPU, float16 with loss scaling on a GPU without bfloat16 (T4,
    RTX 20), and float32 on a CPU."""
    high_resolution: HighResolution | None = None
    """Tiles, as in LLaVA-1.6, for a model made of `llm` and `vision_tower`: {} for LLaVA-1.6's. Stage 1 then trains its
    newline vector with the projector. With null, the model sees images at one size."""
    max_tiles: Annotated[int, Field(ge=1)] | None = None
    """Most tiles that an image is cut into, besides the one of the whole image (LLaVA-1.6 only: its canvases have 2 to
    4); fewer tiles are fewer tokens and less detail. Null keeps all canvases of the model."""
    new_tokens: Annotated[tuple[NewToken, ...], Field(strict=False)] = ()
    """Tokens that are added to the vocabulary, such as ["<defect>"]; only their rows of the embeddings and of the head
    are trained. Stage 2 only."""

    @field_validator("new_tokens")
    @classmethod
    def _each_once(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [token for token in tokens if tokens.count(token) > 1]:
            raise ValueError(f"{twice[0]!r} is named twice; keep one")
        return tokens

    @model_validator(mode="after")
    def _parts(self) -> ModelSection:
        complete = self.start_from.llava is not None
        if complete and self.high_resolution is not None:
            raise ValueError(
                "high_resolution is set together with start_from.llava, which has tiles if it is a LLaVA-1.6; leave it "
                "out, or cap them by max_tiles"
            )
        for name in ("llm", "vision_tower"):
            if complete and getattr(self, name) is not None:
                raise ValueError(f"{name} is set together with start_from.llava, which is a complete LLaVA; drop one")
            if not complete and self.start_from.run is None and getattr(self, name) is None:
                raise ValueError(f"{name} is missing; name a folder, a Hub id or demo")
        return self


class VisionLoraSection(Section):
    """Adapters on the vision tower's layers up to the one whose features are used; later layers would not train."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank."""
    alpha: Positive | None = None
    """Scaling, as lora.alpha; null is r."""
    targets: Annotated[tuple[VisionLinear, ...], Field(min_length=1, strict=False)] = VISION_LINEARS
    """The vision tower's linear layers that get an adapter."""
    learning_rate: Positive | None = None
    """Peak learning rate; null is training.learning_rate."""


class LoraSection(Section):
    """The adapters on the language model (LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314)."""

    r: Annotated[int, Field(ge=1)] = 64
    """Rank."""
    alpha: Positive = 16
    """Scaling: the update is multiplied by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: Fraction = 0.0
    """Dropout on the input of matrix A."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    dora: bool = False
    """Weight-decomposed adaptation (arXiv 2402.09353)."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = "all-linear"
    """The language model's linear layers that get an adapter: all of them, or a list of names. A Llama, Mistral, Qwen
    or Gemma has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj; a Phi-3 has qkv_proj, o_proj,
    gate_up_proj and down_proj."""
    vision: VisionLoraSection | None = None
    """Adapters on the vision tower; null leaves it frozen."""
    modules_to_save: Annotated[tuple[Literal["lm_head", "embed_tokens"], ...], Field(strict=False)] = ()
    """Matrices that are trained in full, in float32: the head, the embeddings, or both."""
    init: Literal["default", "orthogonal", "eva", "loftq"] = "default"
    """Start of the adapters: default (B is zero), orthogonal, eva (from the training data, which also gives layers
    ranks by their share; arXiv 2410.07170), or loftq (corrects NF4's rounding; arXiv 2310.08659)."""

    @field_validator("init", mode="before")
    @classmethod
    def _init_is_offered(cls, name: Any) -> Any:
        if isinstance(name, str) and name in REFUSED_INITS:
            raise ValueError(f"{name} is not offered: {REFUSED_INITS[name]}; use default, orthogonal, eva or loftq")
        return name

    @model_validator(mode="after")
    def _init_fits(self) -> LoraSection:
        ranks = {"r": self.r} | ({"vision.r": self.vision.r} if self.vision else {})
        odd = [name for name, rank in ranks.items() if rank % 2]
        if self.init == "orthogonal" and odd:
            raise ValueError(f"{odd[0]} is {ranks[odd[0]]}, and init orthogonal needs an even rank; make it even")
        if self.init in ("eva", "loftq") and self.dora:
            raise ValueError(f"init is {self.init} together with dora, whose magnitudes it does not set; drop one")
        if len(set(self.modules_to_save)) < len(self.modules_to_save):
            raise ValueError("modules_to_save names a module twice; keep one")
        return self


class EarlyStoppingSection(Section):
    """Stop when the validation loss no longer falls; the checkpoint with the lowest loss is kept in any case."""

    patience: Annotated[int, Field(ge=1)]
    """Stop after this many validations in a row, one every `eval_every` steps, without a lower loss."""
    min_delta: NotNegative = 0.0
    """A loss counts as lower if it is lower by more than this."""


class TrainingSection(Section):
    """The optimiser and its schedule."""

    epochs: Positive = 1.0
    """Passes over the training rows."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimiser steps; null trains for `epochs`."""
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Samples per device and forward pass."""
    max_tokens_per_row: Annotated[int, Field(ge=16)] | None = None
    """Instead of batch_size: each forward pass has one row of complete samples, packed to at most this many tokens."""
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    """Forward passes per optimiser step; the loss weights all trained tokens of a step equally."""
    learning_rate: Positive
    """Peak learning rate of the adapters (Stage 2) or of the projector (Stage 1)."""
    projector_learning_rate: Positive | None = None
    """Stage 2: peak learning rate of the projector; null is learning_rate."""
    loraplus_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+ (arXiv 2402.12354): the learning rate of an adapter's matrix B is this multiple of that of A; null is 1."""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay, on matrices."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the learning rates rise."""
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Schedule by which the learning rates fall."""
    optimizer: Literal["auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = "auto"
    """Optimiser, by its name in transformers; auto is adamw_torch on a CPU, adamw_torch_fused on a GPU, and there
    paged_adamw_8bit with r of 64 or more, whose states take a quarter of the memory."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute the language model's layers in the backward pass: less memory, up to half as much time again. auto
    recomputes as few layers as memory_gb allows."""
    memory_gb: Literal["auto"] | Positive = "auto"
    """Memory limit of a run in GiB, including CUDA's own half GiB; at most what is free. auto is what is free at the
    start. On a GPU torch cannot take more."""
    group_by_length: bool = True
    """Batch samples of similar length: less padding, if batches are padded (model.attention)."""
    share_images: Literal["auto", "off"] = "auto"
    """Compute an image, and the text before it, once for all rows of a forward pass that have it: exact, and faster
    where several rows ask about one image. auto does so wherever rows are trained without padding."""
    questions_per_image: Annotated[int, Field(ge=1)] = 10
    """Most rows with one image in an optimiser step; its other rows come elsewhere in the epoch."""
    deterministic: bool = False
    """On a GPU, use slower algorithms with which runs are equal bit for bit, also after a resume; without it they agree
    up to rounding. On a CPU they always are."""
    projector_dropout: Fraction = 0.0
    """Dropout after the projector, in training only; the checkpoint is a standard LLaVA."""
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Validate and save every so many steps, and keep the best checkpoint; null validates once, at the end."""
    early_stopping: EarlyStoppingSection | None = None
    """Stop when the validation loss no longer falls; null trains all steps. Needs eval_every and validation rows."""
    save_every: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?min$")] | None = "30 min"
    """Save a checkpoint to resume from, in addition to those of eval_every: every so many steps (100) or minutes
    ("30 min"); null saves only at eval_every."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Log every so many steps."""
    vision_cache: Literal["off", "memory", "disk"] = "off"
    """Compute the vision tower's features of every image once, before training, and keep them in memory or on disk; the
    tower is then not loaded. An image takes 1.2 MB with CLIP ViT-L/14-336 in bfloat16."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that load images; 0 loads them in the training process."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(default=("tensorboard",), strict=False)
    """Where the training curves are logged."""


class EvaluationSection(Section):
    """Evaluation before and after training: ScienceQA accuracy, or exact match and F1 on held-out conversations."""

    before: Annotated[int, Field(ge=0)] | Literal["all"] = "all"
    """Number of held-out questions evaluated before training, drawn by the seed; 0 evaluates none."""
    after: Annotated[int, Field(ge=0)] | Literal["all"] = "all"
    """Number of held-out questions evaluated after training."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Questions per generation batch."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    """Most tokens of an answer."""
    parser: Literal["llava", "lenient"] = "llava"
    """Rule that reads the letter of a ScienceQA answer: LLaVA's, or one that also accepts `b`, `(B)`, "answer: B"."""
    generate_every: Annotated[int, Field(ge=1)] | None = None
    """Every so many steps, generate and score answers to some validation rows; null never."""
    generate_rows: Annotated[int, Field(ge=1)] = 64
    """Number of these validation rows, drawn by the seed; they are the same each time."""
    shuffled: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of held-out conversations that are answered again after training with the images of other rows: at least 40
    rows, where there are as many, and at most 400. 0 leaves it out."""


class Recipe(Section):
    """One training run, Stage 1 or Stage 2."""

    stage: Literal[1, 2]
    """1 trains the projector in full; 2 trains LoRA adapters and the projector."""
    output_dir: OutputPath
    """The run directory."""
    seed: int = 0
    """Seed of everything that is random."""
    model: ModelSection
    """The model that is trained."""
    lora: LoraSection | None = None
    """The adapters; Stage 2 only."""
    data: DataSection
    """The training data."""
    training: TrainingSection
    """How the model is trained."""
    evaluation: EvaluationSection | None = None
    """Evaluation before and after training; null for none."""

    @model_validator(mode="after")
    def _stage_fits(self) -> Recipe:
        start = self.model.start_from
        if self.stage == 1 and self.lora is not None:
            raise ValueError(
                "lora is set in a Stage 1 recipe, which trains only the projector; drop it or set stage: 2"
            )
        if self.stage == 1 and start.run is not None:
            raise ValueError(
                "model.start_from.run is set in a Stage 1 recipe; set stage: 2, or train Stage 1 for more epochs"
            )
        if self.stage == 2 and self.lora is None and start.run is None:
            raise ValueError("lora is missing; Stage 2 trains adapters; lora: {} has the defaults")
        if self.stage == 1 and (start.stage1_run or start.stage1_recipe):
            raise ValueError("model.start_from names a Stage 1 result in a Stage 1 recipe; use untrained: true")
        self._check_trained()
        if self.training.max_tokens_per_row is not None:
            if self.training.batch_size != 1:
                raise ValueError(
                    f"training.batch_size is {self.training.batch_size} together with training.max_tokens_per_row, "
                    "with which a forward pass has one row; drop one"
                )
            if self.model.attention == "sdpa":
                raise ValueError("model.attention is sdpa, which pads; training.max_tokens_per_row needs flash_varlen")
        held_out = (data := self.data).test_rows or data.test_source or data.validation_rows or data.validation_source
        if self.evaluation is not None and data.format == "captions":
            raise ValueError("evaluation needs data.format scienceqa or conversations; it is captions")
        if self.evaluation is not None and data.format == "conversations" and not held_out:
            raise ValueError(
                "evaluation needs held-out rows, and data.validation_rows and data.test_rows are 0; set "
                "data.validation_rows=20, or evaluation=null to train without"
            )
        validated = (
            data.validation_rows
            or data.validation_source
            or (data.format == "scienceqa" and data.splits.validation is not None)
        )
        if self.evaluation is not None and self.evaluation.parser != "llava" and data.format != "scienceqa":
            raise ValueError(
                f"evaluation.parser is {self.evaluation.parser}, which reads ScienceQA's letters, but data.format is "
                f"{data.format}; drop it"
            )
        if self.evaluation is not None and self.evaluation.generate_every is not None and not validated:
            raise ValueError("evaluation.generate_every needs validation rows, and the recipe has none; drop it")
        if self.training.early_stopping is not None and not (self.training.eval_every and validated):
            missing = "validation rows; set data.validation_rows" if not validated else "training.eval_every; set it"
            raise ValueError(f"training.early_stopping counts validations and needs {missing}, or drop early_stopping")
        if self.data.format == "captions" and self.data.template not in ("plain", "auto") and self.stage == 1:
            raise ValueError(f"data.template is {self.data.template}; use plain for captions in Stage 1")
        return self

    def _check_trained(self) -> None:
        """Check what is trained besides the language model's adapters and the projector."""
        lora, model, training = self.lora, self.model, self.training
        if lora is None and model.start_from.run is not None:
            return  # the run's, which is filled in
        if lora is None:
            for key, given in (
                ("model.new_tokens", model.new_tokens),
                ("training.loraplus_ratio", training.loraplus_ratio),
            ):
                if given:
                    raise ValueError(f"{key} is set in a Stage 1 recipe, which trains only the projector; drop it")
            return
        if lora.vision is not None and training.vision_cache != "off":
            raise ValueError(
                f"training.vision_cache is {training.vision_cache} together with lora.vision, which changes the "
                "features at every step; set training.vision_cache: off"
            )
        if lora.init == "loftq" and model.quantization != "nf4":
            raise ValueError(
                f"lora.init is loftq, which corrects the rounding of NF4, but model.quantization is "
                f"{model.quantization}; set model.quantization: nf4"
            )
        if model.new_tokens and lora.modules_to_save:
            raise ValueError(
                "model.new_tokens is set together with lora.modules_to_save, which trains all rows; drop one"
            )
