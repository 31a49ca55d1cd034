"""The data section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_llava.data.formats import Format, describe_choices
from lora_llava.data.templates.named_templates import TemplateName
from lora_llava.recipe.section import InputName, InputPath, Positive, Section


class SplitsSection(Section):
    """Names of the splits of the data."""

    train: str = "train"
    """The split that is trained on."""
    validation: str | None = "val"
    """The split that selects the checkpoint; null for none."""
    test: str | None = "test"
    """The split that is evaluated before and after training, and read for nothing else; null for none."""


class ColumnsSection(Section):
    """Names of a table's columns."""

    image: str = "image"
    """The image's file name, or the image itself."""
    question: str = "question"
    """The user's text."""
    answer: str = "answer"
    """The text that is trained."""
    caption: str = "caption"
    """The image's caption, in captions."""
    id: str = "id"
    """The row's name; rows without one are numbered."""


class SourceSection(Section):
    """One source of rows."""

    name: str | None = None
    """Name in reports; default: the file's name."""
    format: Format = "conversations"
    """As data.format."""
    path: InputName
    """As data.path."""
    file: str | None = None
    """As data.file."""
    revision: str | None = None
    """Branch, tag or commit of a Hub `path`."""
    split: str = "train"
    """Split of a Hub table, of ScienceQA, or of `demo_small`."""
    image_folder: InputPath | None = None
    """Root folder of the images; default: `images` beside the data, or else the folder of the data."""
    columns: ColumnsSection = ColumnsSection()
    """Names of the table's columns."""
    weight: Positive | None = None
    """Share of an epoch, in proportion to the weights of the other sources."""
    rows: Annotated[int, Field(ge=1)] | None = None
    """Number of its rows in an epoch, instead of a weight; more than the source has repeats some."""

    @model_validator(mode="after")
    def _one_share(self) -> SourceSection:
        if self.weight is not None and self.rows is not None:
            raise ValueError("a source has weight or rows; drop one")
        return self


class DataSection(Section):
    """The data and how it is encoded."""

    format: Format = Field(description=describe_choices())
    path: InputName | None = None
    """A file (JSON, JSONL, CSV, TSV, Parquet), a folder with one, a Hub id, `demo` or `demo_small`. Or give sources."""
    file: str | None = None
    """A file in a Hub data set's repository, such as `detail_23k.json`."""
    sources: Annotated[tuple[SourceSection, ...], Field(min_length=1, strict=False)] | None = None
    """Several sources, mixed by weight or rows, instead of path."""
    revision: str | None = None
    """Branch, tag or commit of a Hub `path`."""
    image_folder: InputPath | None = None
    """Root folder of the images; default: `images` beside the data, or else the folder of the data."""
    columns: ColumnsSection = ColumnsSection()
    """Names of the table's columns."""
    splits: SplitsSection = SplitsSection()
    """Names of ScienceQA's splits."""
    validation_rows: Annotated[int, Field(ge=0)] = 0
    """Held-out rows that select the checkpoint, split off by image and seed; ScienceQA has a split for them."""
    test_rows: Annotated[int, Field(ge=0)] = 0
    """Held-out rows for the evaluation before and after training; without them it uses the validation rows."""
    validation_source: SourceSection | None = None
    """A separate source of validation rows, instead of validation_rows."""
    test_source: SourceSection | None = None
    """A separate source of test rows, instead of test_rows."""
    max_train_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only this many training rows, drawn by the seed; with weighted sources, this many per epoch."""
    prompt_order: Literal["QCM-LEA", "QCM-ALE", "CQM-A"] = "QCM-LEA"
    """ScienceQA: question, context, multiple options; then lecture, explanation, answer, in this order."""
    template: TemplateName = "auto"
    """Conversation template. auto is the one that the language model or LLaVA was trained with: its own chat template;
    vicuna_v1 for Vicuna and LLaVA-1.5, which have none that can be trained; plain for captions in Stage 1."""
    system_prompt: str | None = None
    """System text instead of the template's; "" omits it; null keeps the template's."""
    image_position: Literal["first", "last", "random", "as_written"] = "first"
    """Place of a single image: before or after its question, at random (the LLaVA paper's coin flip), or as written in
    the data. Several images keep their places."""
    image_aspect: Literal["auto", "pad", "crop"] = "auto"
    """pad makes images square with the mean colour (LLaVA-1.5); crop does what the tower's own processor does: CLIP's
    crops the centre, SigLIP's scales both sides to the size; auto is the processing saved with model.start_from.llava,
    and pad for a LLaVA made of parts."""
    max_image_pixels: Annotated[int, Field(ge=1)] = 50_000_000
    """Most pixels of an image; a larger one is a bad image."""
    background: Literal["white", "black", "llava"] = "white"
    """Background of transparent images; `llava` drops transparency, as LLaVA's `convert("RGB")` does. Images of 16 bits
    or floats are scaled to 8 bits whatever is set here."""
    follow_links: bool = False
    """Follow links that lead out of the image folder; if false, such links are refused."""
    on_bad_row: Literal["error", "drop"] = "error"
    """How to treat a row that is not a valid conversation; `lora-llava check` lists them."""
    on_bad_image: Literal["error", "drop"] = "error"
    """How to treat a row whose image is missing, corrupt or too large."""
    max_length: Annotated[int, Field(ge=16)] = 2048
    """Most tokens of a sample, including its images' tokens."""
    on_overlong: Literal["error", "drop", "truncate_answer"] = "error"
    """How to treat a longer sample; truncate_answer cuts the end of its last answer and nothing else."""

    def train_sources(self) -> tuple[SourceSection, ...]:
        """Return the training sources: `sources`, or the one that `path` names."""
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
        # Validation would turn a `FoundPath` into a plain string.
        return (source.model_copy(update={"path": self.path, "image_folder": self.image_folder}),)

    def all_sources(self) -> tuple[SourceSection, ...]:
        """Return all sources that are read."""
        held_out = (self.validation_source, self.test_source)
        return (*self.train_sources(), *(source for source in held_out if source is not None))

    @model_validator(mode="after")
    def _one_origin(self) -> DataSection:
        if (self.path is None) == (self.sources is None):
            raise ValueError("give either path or sources")
        if self.sources is not None:
            alone = {"file": None, "revision": None, "image_folder": None, "columns": ColumnsSection()}
            extra = [name for name, usual in alone.items() if getattr(self, name) != usual]
            if extra:
                raise ValueError(f"{extra[0]} is set together with sources; set it in each source")
            formats = {source.format for source in self.sources}
            if self.format == "scienceqa" or ("captions" in formats and self.format != "captions"):
                raise ValueError(f"format is {self.format}; sources mix under conversations, or captions with captions")
            by_rows = any(source.rows for source in self.sources) and not any(source.weight for source in self.sources)
            if by_rows and self.max_train_rows is not None:
                raise ValueError("max_train_rows is set together with sources that set rows; drop one")
        for part in ("validation", "test"):
            source = getattr(self, f"{part}_source")
            if source is not None and (source.weight or source.rows):
                raise ValueError(f"{part}_source has a weight or rows, which only training sources have; drop it")
            if getattr(self, f"{part}_rows") and getattr(self, f"{part}_source"):
                raise ValueError(f"{part}_rows and {part}_source are alternatives; drop one")
            if self.format == "scienceqa" and (getattr(self, f"{part}_rows") or getattr(self, f"{part}_source")):
                raise ValueError(f"{part}_rows or {part}_source with format scienceqa, which has splits; drop it")
        if self.format == "scienceqa" and self.image_position == "as_written":
            raise ValueError("image_position is as_written, but ScienceQA's texts do not place their images; use first")
        return self
