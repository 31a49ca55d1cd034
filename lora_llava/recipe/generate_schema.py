"""The schema of a recipe of `lora-llava generate-data`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_llava.recipe.places import Place
from lora_llava.recipe.section import InputName, InputPath, NotNegative, OutputPath, Positive, Section

Count = Annotated[int, Field(ge=1)]


class ContextsSection(Section):
    """Text descriptions of the images; the files are joined by the image's name, and any may be missing."""

    captions: InputPath | None = None
    """COCO's captions (`captions_train2017.json`), or a table of image and caption."""
    instances: InputPath | None = None
    """COCO's boxes (`instances_train2017.json`)."""
    contexts: InputName | None = None
    """LLaVA's JSONL of captions and instances; `demo` draws images and describes them."""
    boxes: InputPath | None = None
    """Boxes from your own JSON file."""
    box_format: Literal["xyxy", "xywh"] = "xyxy"
    """Coordinates in `boxes`: corners, or left, top, width and height."""
    box_unit: Literal["fraction", "pixel"] = "fraction"
    """Unit of the numbers in `boxes`; pixels need each image's width and height."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Other names of a table's columns, such as `{image: file, caption: text}`."""
    images: InputPath | None = None
    """Folder of the images, for the gallery and for training; generation does not need it."""
    missing_image: Literal["error", "drop"] = "error"
    """How to treat an image that is missing from `images`."""

    @model_validator(mode="after")
    def _something(self) -> ContextsSection:
        if not (self.captions or self.instances or self.contexts or self.boxes):
            raise ValueError("name at least one of captions, instances, contexts, boxes")
        return self


class FlavoursSection(Section):
    """Proportions of the kinds of samples; the defaults are LLaVA-Instruct-158K's (arXiv 2304.08485, section 3)."""

    conversation: NotNegative = 58
    """Several turns about what the image shows."""
    detail: NotNegative = 23
    """A detailed description."""
    reasoning: NotNegative = 77
    """A question that needs reasoning, answered step by step."""

    @model_validator(mode="after")
    def _one(self) -> FlavoursSection:
        if not self.conversation + self.detail + self.reasoning:
            raise ValueError("every weight is 0; set at least one above 0")
        return self


class TeacherSection(Section):
    """The teacher that writes the text: a server, a local model, or the demo's rules."""

    backend: Literal["server", "transformers", "demo"] = "server"
    """An OpenAI-compatible server, a local instruct model, or the demo's rules, which write simple but correct rows."""
    url: str | None = None
    """The server's URL, such as `http://localhost:8000/v1`; its key is read from OPENAI_API_KEY in the environment."""
    model: Annotated[str, Place("named", backend="transformers")] | None = None
    """The model's name on the server (null: the only one it serves), or the folder or Hub id of a local model."""
    temperature: NotNegative | None = 0.7
    """Sampling temperature; null uses the server's default, as some models require."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability mass of nucleus sampling."""
    max_tokens: Count = 1024
    """Most tokens of an answer."""
    concurrency: Count = 16
    """Number of concurrent requests."""
    requests_per_minute: Count | None = None
    """Most requests per minute; null leaves the limit to the server."""
    timeout: Positive = 120.0
    """Seconds within which an answer must be complete."""
    retries: Annotated[int, Field(ge=0)] = 6
    """Retries after a temporary failure."""
    reconnect: Annotated[float, Field(ge=0, le=86_400)] = 600.0
    """Most seconds to wait for a server that is down after it has answered; waiting uses up no retry."""
    structured: bool = True
    """Request JSON by a schema; servers that do not support it get requests without one."""
    price_in: NotNegative | None = None
    """USD per million input tokens; null if unknown."""
    price_out: NotNegative | None = None
    """USD per million output tokens; null if unknown."""
    batch_size: Count = 8
    """Batch size of the local model."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type of the local model's weights."""

    @model_validator(mode="after")
    def _fits(self) -> TeacherSection:
        if self.backend == "server" and not self.url:
            raise ValueError("url is missing; backend server needs the URL of an OpenAI-compatible server")
        if self.backend == "transformers" and not self.model:
            raise ValueError("model is missing; backend transformers needs a folder or a Hub id")
        if self.backend != "server" and self.url:
            raise ValueError(f"url is set with backend {self.backend}; drop it, or use backend: server")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("only one of price_in and price_out is set; set both, in USD per million tokens")
        return self


class GatesSection(Section):
    """Requirements for an answer to be accepted, besides those that always apply."""

    max_attempts: Count = 3
    """Most attempts at a sample."""
    min_turns: Count = 2
    """Fewest questions in a conversation."""
    max_turns: Count = 12
    """Most questions in a conversation."""
    min_words: Annotated[int, Field(ge=0)] | None = None
    """Fewest words in all answers of a sample together; null has a number for each kind."""
    max_words: Count | None = None
    """Most words in all answers of a sample together; null has a number for each kind."""
    max_ungrounded: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Largest share of a sample's things and names that no caption or box contains, where four or more are missing."""


class GenerateRecipe(Section):
    """One set of generated conversations."""

    output_dir: OutputPath
    """The folder for the rows, the ledger of answers, the dataset card and the gallery."""
    seed: int = 0
    """Seed of the draw of images."""
    contexts: ContextsSection
    """Text descriptions of the images."""
    samples: Count | None = None
    """Number of rows to generate; null generates `samples_per_image` for every image."""
    samples_per_image: Count = 1
    """Most samples of one kind per image."""
    flavours: FlavoursSection = FlavoursSection()
    """Proportions of the kinds of samples."""
    prompts: InputPath | None = None
    """Folder of prompts and examples to use instead of the shipped ones."""
    teacher: TeacherSection
    """The teacher that writes the text."""
    gates: GatesSection = GatesSection()
    """Requirements for an answer to be accepted."""
