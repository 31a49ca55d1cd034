"""`lora-llava evaluate`: the table of a run, or of any LLaVA under a recipe: ScienceQA's, or of held-back rows."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import Conversation
from lora_llava.data.files.reading import file_hash
from lora_llava.data.templates import Template, get_template
from lora_llava.evaluation.answerers import (
    Answerer,
    Asked,
    by_likelihood,
    by_reasoned_likelihood,
    by_server,
    by_writing,
    reference_losses,
)
from lora_llava.evaluation.answers import COMPARED_BY, AnswerTable
from lora_llava.evaluation.ask import (
    ask_conversations,
    ask_scienceqa,
    choose_rows,
    questions_hash,
    shuffle_images,
)
from lora_llava.evaluation.question_prompts import PARSERS, PROMPTS, ask_by, choices_of, reasons_first
from lora_llava.evaluation.scienceqa import Table
from lora_llava.evaluation.summary import summarise
from lora_llava.inference.client import ChatServer, find_model
from lora_llava.inference.load import load_answering_model
from lora_llava.inference.sampling import Sampling
from lora_llava.model.adapter_file import checked_base
from lora_llava.model.loading import check_bitsandbytes
from lora_llava.model.provenance import weights_state
from lora_llava.model.start import ModelPlan, plan_model
from lora_llava.model.weights.names import ADAPTER_FILE
from lora_llava.planning.run_plan import build_run_processor
from lora_llava.recipe import EvaluationSection, ModelSection, Recipe, StartFrom, load_recipe
from lora_llava.runs.directory import (
    RECIPE_FILE,
    is_run,
    machine,
    read_data_hashes,
    read_record,
    versions,
    write_json,
)
from lora_llava.splits.split_rows import Split, read_held_out


@dataclass(frozen=True)
class Way:
    """How a model is asked.

    Attributes:
        method: `generate` lets it write; `loglik` takes the likeliest choice.
        prompt: A key of `PROMPTS`; for ScienceQA.
        temperature: As of `Sampling`.
        top_p: As of `Sampling`.
        shuffled: Exchange the images among the questions.
        base_only: The run's base without what was trained.
        parser: Reads ScienceQA's letters, a member of `PARSERS`; None takes the recipe's.
        bad_images: `error`, or `wrong`: a question whose image cannot be opened counts as answered wrongly.
    """

    method: Literal["generate", "loglik"] = "generate"
    prompt: str = "recipe"
    temperature: float = 0.0
    top_p: float = 1.0
    shuffled: bool = False
    base_only: bool = False
    bad_images: Literal["error", "wrong"] = "error"
    parser: Literal["llava", "lenient"] | None = None

    @property
    def suffix(self) -> str:
        """Tells the files of one way from those of another."""
        parts = {
            "base": self.base_only, "shuffled": self.shuffled, self.prompt.replace("-", "_"): self.prompt != "recipe",
            self.method: self.method != "generate", "sampled": self.temperature > 0,
        }  # fmt: skip
        return "".join(f"_{name}" for name, said in parts.items() if said)


@dataclass(frozen=True)
class Opened:
    """What is open before any weight is loaded.

    Attributes:
        recipe: Whose questions are asked.
        base: What is loaded.
        adapter: A run directory; None for the base alone.
        plan: The model's.
        tokenizer: Of its processor.
        split: The rows that may be asked.
        name: The split's.
    """

    recipe: Recipe
    base: str
    adapter: Path | None
    plan: ModelPlan
    tokenizer: Any
    split: Split
    name: str

    @property
    def science(self) -> bool:
        return self.recipe.data.format == "scienceqa"

    @property
    def template(self) -> Template:
        return get_template(self.recipe.data.template, self.recipe.data.system_prompt)


def evaluate(
    model: str, way: Way | None = None, *, recipe: str | None = None, overrides: Sequence[str] = (),
    limit: int | None = None, output: str | None = None, server: ChatServer | None = None,
) -> Table | AnswerTable:  # fmt: skip
    """Ask a model the held-out questions of a recipe, and write its answers and what the figure stands on.

    Args:
        model: A run directory, a folder with a whole LLaVA, or a Hub id; with a server its questions alone are taken,
            or it is the model's name there.
        way: How it is asked.
        recipe: Whose data, template and evaluation to use; by default a run's or merged folder's own.
        overrides: `key.sub=value` texts.
        limit: Most questions.
        output: Folder of the predictions file.
        server: Who answers, in place of a model here.

    Returns:
        The table.

    Raises:
        UserError: For a model, recipe or data that is missing or does not fit.
    """
    way = way or Way()
    if server is not None:
        server = find_model(server if server.model or Path(model).is_dir() else replace(server, model=model))
    opened = open_evaluation(model, way, recipe, overrides, server)
    rows = held_out_rows(opened, way, limit)
    if way.method == "loglik" and not opened.science:
        for row in rows:  # before any weight is loaded
            choices_of(row, "", prompt=way.prompt)
    settings = opened.recipe.evaluation or EvaluationSection()
    sampling = Sampling(way.temperature, way.top_p, settings.max_new_tokens, opened.recipe.seed)
    about = _about(opened, way, sampling, server, limit)
    losses: Callable[[], dict[int, tuple[float, int]]] | None = None
    if server is not None:
        answerer = by_server(server, opened.split.images, sampling, opened.template.stop_string)
    else:
        asked = load_asked(opened, settings.batch_size)
        answerer = open_answerer(opened, way, asked, sampling)
        losses = None if opened.science else partial(reference_losses, asked, rows)
    folder = Path(output or (model if Path(model).is_dir() else "."))
    parser = way.parser or settings.parser
    suffix = way.suffix + f"_{parser}" * (parser != settings.parser) + _other_suffix(recipe, overrides, limit, server)
    common: dict[str, Any] = {
        "predictions": folder / f"predictions{suffix}.jsonl", "description": "evaluating", "key": about,
        "bad_images": way.bad_images,
    }  # fmt: skip
    start = time.monotonic()
    table: Table | AnswerTable
    try:
        if opened.science:
            table, marked = ask_scienceqa(rows, answerer, parser if way.method == "generate" else "llava", **common)
        else:
            table, marked = ask_conversations(rows, answerer, losses, **common)  # type: ignore[assignment]
    except torch.OutOfMemoryError:
        raise UserError(
            f"the GPU's memory ran out with {settings.batch_size} questions at once; set evaluation.batch_size="
            f"{max(1, settings.batch_size // 2)}: what was answered is kept"
        ) from None
    about |= {"model": model, "questions": questions_hash(rows)}
    _write_summary(folder / f"evaluation{suffix}.json", about, summarise(table, marked), time.monotonic() - start)
    return table


def _other_suffix(
    recipe: str | None, overrides: Sequence[str], limit: int | None, server: ChatServer | None
) -> str:  # fmt: skip
    """Tells the files of other questions, or of other answers, from a run's own."""
    data = sorted(text for text in overrides if text.startswith("data."))
    parts = {
        "server": server is not None, Path(recipe or "").stem: recipe is not None, f"limit{limit}": limit is not None,
        hashlib.sha256("\n".join(data).encode()).hexdigest()[:6]: bool(data),
    }  # fmt: skip
    return "".join(f"_{name}" for name, said in parts.items() if said)


def load_asked(opened: Opened, batch_size: int) -> Asked:
    """Load the weights of an opened evaluation, to be asked so many questions at once."""
    section = opened.recipe.model
    return Asked(
        load_answering_model(opened.base, opened.adapter, quantization=section.quantization, dtype=section.dtype),
        opened.tokenizer, opened.template, opened.plan.config.image_seq_length, opened.split.load_pixels, batch_size,
    )  # fmt: skip


def open_answerer(opened: Opened, way: Way, asked: Asked, sampling: Sampling) -> Answerer:
    """Who answers in this way; `sampling` is of what is written."""
    if way.method == "generate":
        return by_writing(asked, sampling)
    choices = partial(choices_of, prompt=way.prompt)
    if opened.science and reasons_first(way.prompt, opened.recipe.data.prompt_order):
        return by_reasoned_likelihood(asked, sampling, choices)
    return by_likelihood(asked, choices)


def _write_summary(file: Path, about: dict[str, Any], found: dict[str, Any], seconds: float) -> None:
    questions = next(iter(found["table"].values()))
    count = questions["count"] if "count" in questions else questions["questions"]
    took = {"seconds": round(seconds, 2), "questions": count}
    write_json(file, {**found, "asked": about, "took": took, "machine": machine(), "versions": versions()})


def open_evaluation(
    model: str, way: Way, recipe: str | None = None, overrides: Sequence[str] = (), server: ChatServer | None = None
) -> Opened:  # fmt: skip
    """Open everything that an evaluation needs but the weights; arguments and errors are those of `evaluate`."""
    folder = Path(model)
    run = is_run(folder)
    if recipe is None and not (folder / RECIPE_FILE).is_file():
        raise UserError(
            f"{model} is not a finished run and holds no recipe; name one whose questions to ask with --recipe"
        )
    if not run and recipe is None:  # a merged folder is asked as it is stored
        overrides = ["model.quantization=none", *overrides]
    chosen = load_recipe(recipe or folder / RECIPE_FILE, overrides)
    _check_way(way, chosen)
    if server is not None and (way.method != "generate" or way.base_only):
        raise UserError("--server writes answers; --method loglik and --base-only need a model here")
    if server is None and chosen.model.quantization == "nf4":
        check_bitsandbytes()
    if way.base_only and not run:
        raise UserError(f"--base-only: {model} is no run with an adapter, but a whole model; leave it out")
    base = str(checked_base(read_record(folder), folder)) if run else model
    elsewhere = server is not None and not folder.is_dir()
    plan = plan_model(chosen.model if elsewhere else _as_llava(chosen.model, base))
    tokenizer, processor = build_run_processor(chosen, plan.config, plan.tokenizer_folder, plan.image_folder)
    read = partial(read_held_out, chosen, processor, plan.config)
    name, split = read(trusted=way.bad_images == "wrong")
    other_data = ("data.path=", "data.file=", "data.format=", "data.sources")
    if run and recipe is None and not any(text.startswith(other_data) for text in overrides):
        if way.bad_images == "wrong" and not _are_same_rows(folder, chosen, split):
            name, split = read()  # the run itself may have left rows out, by its own rule
        _check_same_rows(folder, chosen, split)
    return Opened(chosen, base, folder if run and not way.base_only else None, plan, tokenizer, split, name)


def _check_way(way: Way, recipe: Recipe) -> None:
    if way.prompt not in PROMPTS:
        raise UserError(f"--prompt: {way.prompt!r} is unknown; use one of {', '.join(PROMPTS)}")
    if way.prompt != "recipe" and recipe.data.format != "scienceqa":
        raise UserError(f"--prompt {way.prompt} is a way to ask ScienceQA; this recipe's data is {recipe.data.format}")
    if way.parser is not None and (way.method == "loglik" or recipe.data.format != "scienceqa"):
        raise UserError(
            f"--parser {way.parser} reads the letter in what is written to ScienceQA's questions; leave it out with "
            + ("--method loglik" if way.method == "loglik" else f"data.format {recipe.data.format}")
        )
    if way.method == "loglik" and (way.temperature or way.top_p != 1):
        raise UserError("--temperature and --top-p are of answers that are written; leave them out of --method loglik")


def held_out_rows(opened: Opened, way: Way, limit: int | None = None) -> list[Conversation]:
    """The questions, written this way; at most `limit`, drawn by the recipe's seed."""
    count = limit if limit is not None else "all"
    rows = opened.split.read(choose_rows(range(len(opened.split.rows)), count, opened.recipe.seed))
    if way.shuffled:
        rows = shuffle_images(rows, opened.recipe.seed)
    return [ask_by(row, way.prompt) for row in rows]


def _about(
    opened: Opened, way: Way, sampling: Sampling, server: ChatServer | None, limit: int | None
) -> dict[str, Any]:  # fmt: skip
    """What the answers depend on besides the questions, so that they can be told from others and got again."""
    recipe = opened.recipe
    parser = way.parser or (recipe.evaluation or EvaluationSection()).parser
    about: dict[str, Any] = {
        "way": asdict(way), "sampling": asdict(sampling), "data": recipe.data.model_dump(mode="json"),
        "split": opened.name, "limit": limit, "seed": recipe.seed,
    }  # fmt: skip
    if server is not None:
        about |= {"server": server.url, "served_model": server.model}
    else:
        about |= {
            "weights": _weights(opened), "quantization": recipe.model.quantization, "dtype": recipe.model.dtype,
            "batch_size": (recipe.evaluation or EvaluationSection()).batch_size,
        }  # fmt: skip
    if opened.science:
        what = PROMPTS[way.prompt]
        about["prompt"] = {"name": way.prompt, "what": what, "order": recipe.data.prompt_order}
        about["parser"] = "none: the likeliest choice" if way.method == "loglik" else PARSERS[parser]
    else:
        about["marking"] = COMPARED_BY
    return about


def _weights(opened: Opened) -> dict[str, str]:
    """What tells these weights from others."""
    found = {"adapter": file_hash(opened.adapter / ADAPTER_FILE)} if opened.adapter is not None else {}
    folder = Path(opened.base)
    return found | {"base": weights_state(folder) if folder.is_dir() else opened.base}


def _check_same_rows(folder: Path, recipe: Recipe, split: Split) -> None:
    """Hold that rows that were drawn from the training data are those that the run held back.

    Raises:
        UserError: Where the data has changed since: it may have been trained on.
    """
    if not _are_same_rows(folder, recipe, split):
        raise UserError(
            f"{folder}: the data is not what it was: the rows that would be held back now may have been trained on; "
            "restore it, or name rows to ask with data.test_rows=0 data.test_source={path: FILE}"
        )


def _are_same_rows(folder: Path, recipe: Recipe, split: Split) -> bool:
    data = recipe.data
    asked = "test" if data.test_rows else "validation"
    own = data.test_source or (data.validation_source and asked == "validation")
    known = read_data_hashes(folder).get(asked)
    return data.format != "conversations" or bool(own) or known in (None, split.fingerprint())


def _as_llava(section: ModelSection, base: str) -> ModelSection:
    """The model section of the complete LLaVA that a base is."""
    return ModelSection(start_from=StartFrom(llava=base), quantization=section.quantization, dtype=section.dtype)
