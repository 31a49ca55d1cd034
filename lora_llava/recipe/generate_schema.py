"""What a recipe of `lora-llava generate-data` may say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_llava.recipe.places import Place
from lora_llava.recipe.schema import InputName, InputPath, NotNegative, OutputPath, Positive, Section

Count = Annotated[int, Field(ge=1)]


class ContextsSection(Section):
    """What is known of the images in words; files are joined by the image's name, and any may be missing."""

    captions: InputPath | None = None
    """COCO's captions (`captions_train2017.json`), or a table of image and caption."""
    instances: InputPath | None = None
    """COCO's boxes (`instances_train2017.json`)."""
    contexts: InputName | None = None
    """LLaVA's JSONL of captions and instances; `demo` draws images and knows what is in them."""
    boxes: InputPath | None = None
    """Boxes from a JSON file of your own."""
    box_format: Literal["xyxy", "xywh"] = "xyxy"
    """Corners, or left, top, width and height, in `boxes`."""
    box_unit: Literal["fraction", "pixel"] = "fraction"
    """Of the numbers in `boxes`; pixels need each image's width and height."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Other names of a table's columns, such as `{image: file, caption: text}`."""
    images: InputPath | None = None
    """Folder of the images: for the gallery and for training; none is needed to generate."""
    missing_image: Literal["error", "drop"] = "error"
    """Where `images` is given and an image is not in it."""

    @model_validator(mode="after")
    def _something(self) -> ContextsSection:
        if not (self.captions or self.instances or self.contexts or self.boxes):
            raise ValueError("name at least one of captions, instances, contexts, boxes")
        return self


class FlavoursSection(Section):
    """How many parts of each kind; the numbers are LLaVA-Instruct-158K's (arXiv 2304.08485, section 3)."""

    conversation: NotNegative = 58
    """Several turns about what is seen."""
    detail: NotNegative = 23
    """A detailed description."""
    reasoning: NotNegative = 77
    """A question that takes thought, answered step by step."""

    @model_validator(mode="after")
    def _one(self) -> FlavoursSection:
        if not self.conversation + self.detail + self.reasoning:
            raise ValueError("every weight is 0; give at least one a number above")
        return self


class TeacherSection(Section):
    """Who writes: a server, a model here, or the demo's rules."""

    backend: Literal["server", "transformers", "demo"] = "server"
    """An OpenAI-compatible server; a local instruct model; or the demo's rules, which write stiff but true rows."""
    url: str | None = None
    """The server's, such as `http://localhost:8000/v1`; its key is the environment's OPENAI_API_KEY."""
    model: Annotated[str, Place("named", backend="transformers")] | None = None
    """Its name on the server (null: the only one there), or the folder or Hub id of the local model."""
    temperature: NotNegative | None = 0.7
    """Null leaves it to the server, as some models demand."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the probability that tokens are drawn from."""
    max_tokens: Count = 1024
    """Longest answer."""
    concurrency: Count = 16
    """Requests at once."""
    requests_per_minute: Count | None = None
    """Most requests in a minute; null leaves it to the server to say."""
    timeout: Positive = 120.0
    """Seconds in which an answer has to be complete."""
    retries: Annotated[int, Field(ge=0)] = 6
    """Further tries after a failure that may pass."""
    structured: bool = True
    """Ask for JSON by schema; a server that does not know it is asked without."""
    price_in: NotNegative | None = None
    """USD for a million tokens to the teacher; null where unknown."""
    price_out: NotNegative | None = None
    """The same of tokens from it."""
    batch_size: Count = 8
    """Of the local model."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the local model's weights."""

    @model_validator(mode="after")
    def _fits(self) -> TeacherSection:
        if self.backend == "server" and not self.url:
            raise ValueError("url is missing; backend server asks an OpenAI-compatible server")
        if self.backend == "transformers" and not self.model:
            raise ValueError("model is missing; backend transformers takes a folder or a Hub id")
        if self.backend != "server" and self.url:
            raise ValueError(f"url stands beside backend {self.backend}; drop it, or use backend: server")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("price_in and price_out go together: USD for a million tokens, each way")
        return self


class GatesSection(Section):
    """What an answer must hold to be taken, besides what is always asked of it."""

    max_attempts: Count = 3
    """Times that a sample is asked for until one passes."""
    min_turns: Count = 2
    """Questions in a conversation."""
    max_turns: Count = 12
    """The same, at most."""
    min_words: Annotated[int, Field(ge=0)] | None = None
    """Words in all answers of a sample together; null takes a number for each kind."""
    max_words: Count | None = None
    """The same, at most."""


class GenerateRecipe(Section):
    """One set of generated conversations."""

    output_dir: OutputPath
    """Where the rows, the ledger of answers, the card and the gallery go."""
    seed: int = 0
    """Seeds which images are drawn."""
    contexts: ContextsSection
    """What is known of the images."""
    samples: Count | None = None
    """Rows to make; null makes `samples_per_image` for every image."""
    samples_per_image: Count = 1
    """Most samples of one kind for an image."""
    flavours: FlavoursSection = FlavoursSection()
    """The mixture."""
    prompts: InputPath | None = None
    """Folder of prompts and examples in place of ours."""
    teacher: TeacherSection
    """Who writes."""
    gates: GatesSection = GatesSection()
    """What is not taken."""
