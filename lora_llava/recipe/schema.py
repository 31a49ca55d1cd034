"""What a recipe may say. Every section is strict: no unknown key, no silent conversion."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_llava.data.formats import Format, describe_choices
from lora_llava.recipe.places import Place

Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEARS: tuple[Linear, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama block (transformers, models/llama/modeling_llama.py)."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
InputPath = Annotated[str, Place("input")]
"""A file or folder that is read."""
InputName = Annotated[str, Place("named")]
"""The same, or a Hub id, or `demo`."""
OutputPath = Annotated[str, Place("output")]
"""A file or folder that is written."""


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class StartFrom(Section):
    """Where the projector's weights come from: exactly one of these."""

    stage1_run: InputPath | None = None
    """A run directory of Stage 1."""
    stage1_recipe: InputPath | None = None
    """A Stage 1 recipe, beside this one; run first when its result is not there."""
    projector: InputName | None = None
    """LLaVA's `mm_projector.bin`: a file, or a Hub id that holds one."""
    projector_revision: str | None = None
    """Branch, tag or commit of `projector`."""
    llava: InputName | None = None
    """A complete LLaVA: a folder, or a Hub id such as llava-hf/llava-1.5-7b-hf."""
    llava_revision: str | None = None
    """Branch, tag or commit of `llava`."""
    untrained: Literal[True] | None = None
    """A fresh projector, drawn by the recipe's seed."""

    @model_validator(mode="after")
    def _exactly_one(self) -> StartFrom:
        names = ("stage1_run", "stage1_recipe", "projector", "llava", "untrained")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(names)}; given: {', '.join(given) or 'none'}")
        return self


class ModelSection(Section):
    """The parts of the LLaVA and how they are loaded."""

    llm: InputName | None = None
    """The language model: `demo`, a folder, or a Hub id. Not with `start_from.llava`."""
    llm_revision: str | None = None
    """Branch, tag or commit of `llm`."""
    vision_tower: InputName | None = None
    """The CLIP vision tower: `demo`, a folder, or a Hub id. Not with `start_from.llava`."""
    vision_tower_revision: str | None = None
    """Branch, tag or commit of `vision_tower`."""
    projector_type: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"
    """Two layers with GELU (LLaVA-1.5), or the matrix W of the first LLaVA."""
    start_from: StartFrom
    """Where the projector comes from."""
    quantization: Literal["nf4", "none"] = "nf4"
    """NF4 with double quantisation for the language model's linear layers (QLoRA), or none (LoRA)."""
    attention: Literal["auto", "flash_varlen", "sdpa"] = "auto"
    """`flash_varlen` trains on rows without padding, by flash_attn or torch's own kernel on a GPU and sample by sample
    on a CPU; `sdpa` pads; auto takes flash_varlen wherever it runs."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What is computed in; auto is bfloat16 on a GPU and float32 on a CPU."""

    @model_validator(mode="after")
    def _parts(self) -> ModelSection:
        complete = self.start_from.llava is not None
        for name in ("llm", "vision_tower"):
            if complete and getattr(self, name) is not None:
                raise ValueError(f"{name} stands beside start_from.llava, which already is a complete LLaVA; drop one")
            if not complete and getattr(self, name) is None:
                raise ValueError(f"{name} is missing; name a folder, a Hub id or demo")
        return self


class LoraSection(Section):
    """The adapters on the language model (LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314)."""

    r: Annotated[int, Field(ge=1)] = 64
    """Rank."""
    alpha: Positive = 16
    """Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: Fraction = 0.0
    """Dropout before A."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    dora: bool = False
    """Weight-decomposed adaptation (arXiv 2402.09353)."""
    targets: Annotated[tuple[Linear, ...], Field(min_length=1, strict=False)] = LINEARS
    """The language model's linear layers that get an adapter."""


class SplitsSection(Section):
    """Names of the data's splits."""

    train: str = "train"
    """Trained on."""
    validation: str | None = "val"
    """Picks the checkpoint; null for none."""
    test: str | None = "test"
    """Read only by the tables before and after; null for none."""


class ColumnsSection(Section):
    """Names of a table's columns."""

    image: str = "image"
    """The image's file name, or the image itself."""
    question: str = "question"
    """What the user asks."""
    answer: str = "answer"
    """What is trained."""
    caption: str = "caption"
    """The image's caption, in captions."""
    id: str = "id"
    """The row's name; rows without one are numbered."""


class SourceSection(Section):
    """Rows from one place."""

    name: str | None = None
    """Names it in reports; default: the file's name."""
    format: Format = "conversations"
    """As data.format."""
    path: InputName
    """As data.path."""
    file: str | None = None
    """As data.file."""
    revision: str | None = None
    """Branch, tag or commit of a Hub `path`."""
    split: str = "train"
    """Split of a Hub table, or of ScienceQA."""
    image_folder: InputPath | None = None
    """Root of the images; default: `images` beside the data, else the data's own folder."""
    columns: ColumnsSection = ColumnsSection()
    """What a table calls its columns."""
    weight: Positive | None = None
    """Its part of an epoch, in proportion to the other sources' weights."""
    rows: Annotated[int, Field(ge=1)] | None = None
    """Or how many of its rows an epoch has; more than it has repeats some."""

    @model_validator(mode="after")
    def _one_share(self) -> SourceSection:
        if self.weight is not None and self.rows is not None:
            raise ValueError("a source has weight or rows; drop one")
        return self


class DataSection(Section):
    """What is read and how it becomes tokens."""

    format: Format = Field(description=describe_choices())
    path: InputName | None = None
    """A file (JSON, JSONL, CSV, TSV, Parquet), a folder with one, a Hub id, or `demo`. Or give sources."""
    file: str | None = None
    """A file in a Hub data set's repository, such as `detail_23k.json`."""
    sources: Annotated[tuple[SourceSection, ...], Field(min_length=1, strict=False)] | None = None
    """Several of them, mixed by weight or rows, in place of path."""
    revision: str | None = None
    """Branch, tag or commit of a Hub `path`."""
    image_folder: InputPath | None = None
    """Root of the images; default: `images` beside the data, else the data's own folder."""
    columns: ColumnsSection = ColumnsSection()
    """What a table calls its columns."""
    splits: SplitsSection = SplitsSection()
    """Names of ScienceQA's splits."""
    validation_rows: Annotated[int, Field(ge=0)] = 0
    """Rows held back, by image and by the seed, to pick the checkpoint; ScienceQA has a split for it."""
    test_rows: Annotated[int, Field(ge=0)] = 0
    """More rows held back, read only by the tables before and after; without any they ask the validation rows."""
    validation_source: SourceSection | None = None
    """Rows of their own in place of validation_rows."""
    test_source: SourceSection | None = None
    """Rows of their own in place of test_rows."""
    max_train_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only this many training rows, drawn by the seed, or, of sources with weights, this many an epoch."""
    prompt_order: Literal["QCM-LEA", "QCM-ALE", "CQM-A"] = "QCM-LEA"
    """ScienceQA: question, context, multiple options; then lecture, explanation, answer, in this order."""
    template: Literal["vicuna_v1", "vicuna_v0", "plain", "llama_2"] = "vicuna_v1"
    """Conversation template."""
    system_prompt: str | None = None
    """Replaces the template's system text; "" leaves it out; null keeps it."""
    image_position: Literal["first", "last", "random", "as_written"] = "first"
    """A lone image before or after its question; random is the LLaVA paper's coin flip, as_written what the data
    has. Several images stay where they stand."""
    image_aspect: Literal["pad", "crop"] = "pad"
    """Pad images to a square with CLIP's mean colour (LLaVA-1.5), or crop the centre (CLIP, llava-hf)."""
    max_image_pixels: Annotated[int, Field(ge=1)] = 50_000_000
    """An image with more pixels is a bad image."""
    background: Literal["white", "black", "llava"] = "white"
    """What transparent parts of images are composited on; `llava` drops transparency, as LLaVA's own
    `convert("RGB")` does. Images of 16 bits or floats are scaled to 8 bits whatever is set here."""
    follow_links: bool = False
    """Open images that links in the image folder lead to outside it; without it such links are refused."""
    on_bad_row: Literal["error", "drop"] = "error"
    """What becomes of a row that is no conversation; `lora-llava check` lists them."""
    on_bad_image: Literal["error", "drop"] = "error"
    """What becomes of a row whose image is missing, corrupt or too large."""
    max_length: Annotated[int, Field(ge=16)] = 2048
    """Most tokens of a sample, its image's included."""
    on_overlong: Literal["error", "drop", "truncate_answer"] = "error"
    """What becomes of a longer sample; truncate_answer cuts the end of its last answer and nothing else."""

    def train_sources(self) -> tuple[SourceSection, ...]:
        """What is trained on: the sources, or the one that path names."""
        if self.sources is not None:
            return self.sources
        assert self.path is not None  # the validator below
        source = SourceSection(
            format=self.format,
            path=self.path,
            file=self.file,
            revision=self.revision,
            split=self.splits.train,
            columns=self.columns,
        )
        # Validation would make plain text of paths, which know where they were looked for.
        return (source.model_copy(update={"path": self.path, "image_folder": self.image_folder}),)

    def all_sources(self) -> tuple[SourceSection, ...]:
        """Everything that is read."""
        held = (self.validation_source, self.test_source)
        return (*self.train_sources(), *(source for source in held if source is not None))

    @model_validator(mode="after")
    def _one_origin(self) -> DataSection:
        if (self.path is None) == (self.sources is None):
            raise ValueError("give path, or sources, and not both")
        if self.sources is not None:
            alone = {"file": None, "revision": None, "image_folder": None, "columns": ColumnsSection()}
            beside = [name for name, usual in alone.items() if getattr(self, name) != usual]
            if beside:
                raise ValueError(f"{beside[0]} stands beside sources; give it in each source")
            formats = {source.format for source in self.sources}
            if self.format == "scienceqa" or ("captions" in formats and self.format != "captions"):
                raise ValueError(f"format is {self.format}; sources mix under conversations, or captions with captions")
            said = any(source.rows for source in self.sources) and not any(source.weight for source in self.sources)
            if said and self.max_train_rows is not None:
                raise ValueError("max_train_rows stands beside sources that say their rows; drop one")
        for part in ("validation", "test"):
            held = getattr(self, f"{part}_source")
            if held is not None and (held.weight or held.rows):
                raise ValueError(f"{part}_source has a weight or rows, which sources that are trained on have; drop it")
            if getattr(self, f"{part}_rows") and getattr(self, f"{part}_source"):
                raise ValueError(f"{part}_rows and {part}_source are two ways to one thing; drop one")
            if self.format == "scienceqa" and (getattr(self, f"{part}_rows") or getattr(self, f"{part}_source")):
                raise ValueError(f"{part}_rows or {part}_source with format scienceqa, which has splits; drop it")
        if self.format == "scienceqa" and self.image_position == "as_written":
            raise ValueError("image_position is as_written, but ScienceQA's images are written nowhere; use first")
        return self


class TrainingSection(Section):
    """The optimiser and its schedule."""

    epochs: Positive = 1.0
    """Passes over the training rows."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimiser steps; null goes by epochs."""
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Samples per device and forward pass."""
    max_tokens_per_row: Annotated[int, Field(ge=16)] | None = None
    """In place of batch_size: a forward pass takes one row of whole samples, packed to at most this many tokens."""
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    """Forward passes per optimiser step; the loss weighs every trained token of a step alike."""
    learning_rate: Positive
    """Peak rate of the adapters (Stage 2) or of the projector (Stage 1)."""
    projector_learning_rate: Positive | None = None
    """Stage 2: peak rate of the projector; null takes learning_rate."""
    weight_decay: NotNegative = 0.0
    """AdamW's decay of matrices."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps over which the rates rise."""
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """How the rates fall."""
    optimizer: Literal["auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = "auto"
    """transformers' name of the optimiser; auto is adamw_torch, on a GPU from r = 64 on paged_adamw_8bit, which has a
    quarter of its states and needs CUDA."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this norm; 0 never."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute the language model's layers in the backward pass: less memory, up to a third more time. auto recomputes
    as few as memory_gb allows."""
    memory_gb: Literal["auto"] | Positive = "auto"
    """What a step may take, in GiB, CUDA's own half included; auto is what is free at the start."""
    group_by_length: bool = True
    """Batches of samples of similar length: less padding, where batches are padded (model.attention)."""
    projector_dropout: Fraction = 0.0
    """Dropout after the projector, in training only; the checkpoint stays stock."""
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Validate every so many steps, save, and keep the best; null once at the end."""
    save_every: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?min$")] | None = "30 min"
    """Save a checkpoint to resume from, beside those of eval_every: every so many steps (100), or minutes ("30 min");
    null saves at eval_every alone."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Log every so many steps."""
    vision_cache: Literal["off", "memory", "disk"] = "off"
    """Compute the tower's features of every image once, before training, and keep them in memory or on disk; the
    tower is then not loaded. An image takes 1.2 MB with CLIP ViT-L/14-336 in bfloat16."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that load images; 0 loads them in the training process."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(default=("tensorboard",), strict=False)
    """Where the curves go."""


class EvaluationSection(Section):
    """The tables before and after training: ScienceQA's accuracy, or exact match and F1 of held-back conversations."""

    before: Annotated[int, Field(ge=0)] | Literal["all"] = "all"
    """Held-back questions asked before training, drawn by the seed; 0 asks none."""
    after: Annotated[int, Field(ge=0)] | Literal["all"] = "all"
    """Held-back questions asked after training."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Questions answered at once."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    """Longest answer in tokens."""
    parser: Literal["llava", "lenient"] = "llava"
    """How the letter of ScienceQA's answers is read: by LLaVA's rule, or also `b`, `(B)`, "answer: B" and the like."""
    generate_every: Annotated[int, Field(ge=1)] | None = None
    """Every so many steps, let the model answer a slice of the validation rows and score it; null never."""
    generate_rows: Annotated[int, Field(ge=1)] = 64
    """Validation rows of that slice, drawn by the seed, the same each time."""


class Recipe(Section):
    """One training run, Stage 1 or Stage 2."""

    stage: Literal[1, 2]
    """1 trains the projector in full; 2 trains LoRA adapters and the projector."""
    output_dir: OutputPath
    """The run directory."""
    seed: int = 0
    """Seeds everything drawn at random."""
    model: ModelSection
    """The parts of the LLaVA."""
    lora: LoraSection | None = None
    """The adapters; Stage 2 only."""
    data: DataSection
    """What is trained on."""
    training: TrainingSection
    """How it is trained."""
    evaluation: EvaluationSection | None = None
    """The tables before and after; null for none."""

    @model_validator(mode="after")
    def _stage_fits(self) -> Recipe:
        start = self.model.start_from
        if self.stage == 1 and self.lora is not None:
            raise ValueError(
                "lora stands in a Stage 1 recipe, which trains the projector alone; drop it or set stage: 2"
            )
        if self.stage == 2 and self.lora is None:
            raise ValueError("lora is missing; Stage 2 trains adapters (lora: {} takes the defaults)")
        if self.stage == 1 and (start.stage1_run or start.stage1_recipe):
            raise ValueError("model.start_from names a Stage 1 result in a Stage 1 recipe; use untrained: true")
        if self.training.max_tokens_per_row is not None:
            if self.training.batch_size != 1:
                raise ValueError(
                    f"training.batch_size is {self.training.batch_size} beside training.max_tokens_per_row, by which a "
                    "row is a forward pass; drop one"
                )
            if self.model.attention == "sdpa":
                raise ValueError("model.attention is sdpa, which pads; training.max_tokens_per_row needs flash_varlen")
        held_back = (data := self.data).test_rows or data.test_source or data.validation_rows or data.validation_source
        if self.evaluation is not None and data.format == "captions":
            raise ValueError("evaluation needs data.format scienceqa or conversations; it is captions")
        if self.evaluation is not None and data.format == "conversations" and not held_back:
            raise ValueError(
                "evaluation needs rows that are not trained on: set data.test_rows or data.validation_rows"
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
            raise ValueError("evaluation.generate_every scores validation rows, and the recipe has none; drop it")
        if self.data.format == "captions" and self.data.template != "plain" and self.stage == 1:
            raise ValueError(f"data.template is {self.data.template}; Stage 1 captions take plain")
        return self
