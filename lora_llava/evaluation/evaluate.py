"""`lora-llava evaluate`: score a run, or any LLaVA under a recipe, on ScienceQA or on held-out rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lora_llava.core.errors import UserError
from lora_llava.core.storage import file_hash
from lora_llava.data.conversation import Conversation
from lora_llava.data.templates.spans import AnyTemplate
from lora_llava.data.tokens import leading_ids
from lora_llava.evaluation.answerers import (
    Answerer,
    Evaluator,
    by_generation,
    by_likelihood,
    by_reasoned_likelihood,
    by_server,
    reference_losses,
)
from lora_llava.evaluation.answers import COMPARED_BY, AnswerTable
from lora_llava.evaluation.asked.asked_rows import (
    OTHER_DATA,
    are_same_rows,
    check_same_rows,
    choose_recipe,
    earlier_of,
    other_suffix,
    report_asked,
)
from lora_llava.evaluation.asked.data_file import DataFile
from lora_llava.evaluation.asked.served_prompts import match_bos, sent_prompts
from lora_llava.evaluation.asked.trained_rows import TrainedRows, count_trained
from lora_llava.evaluation.figures.majority import saved_majority
from lora_llava.evaluation.figures.run_figures import ANSWERS, build_figures
from lora_llava.evaluation.question_prompts import PARSERS, PROMPTS, choices_of, reasons_first, with_prompt
from lora_llava.evaluation.row_evaluation import (
    choose_rows,
    evaluate_conversations,
    evaluate_scienceqa,
    questions_hash,
    report,
    shuffle_images,
)
from lora_llava.evaluation.scienceqa import Table
from lora_llava.evaluation.summary import summarise
from lora_llava.inference.client.client import ChatServer, find_model
from lora_llava.inference.load import load_answering_model, use_canvases, use_tiles_of_run
from lora_llava.inference.sampling import Sampling
from lora_llava.model.adapter_file import checked_base
from lora_llava.model.families.image_counts import grid_of, tokens_of
from lora_llava.model.loading import check_bitsandbytes
from lora_llava.model.provenance import weights_state
from lora_llava.model.start import ModelPlan, plan_model
from lora_llava.model.vision import llava_of
from lora_llava.model.weights.names import ADAPTER_FILE
from lora_llava.planning.run_plan import build_run_processor
from lora_llava.recipe import EvaluationSection, ModelSection, Recipe, StartFrom
from lora_llava.runs.check_run import check_run
from lora_llava.runs.directory import (
    is_run,
    machine,
    read_record,
    versions,
    write_json,
)
from lora_llava.splits.earlier_rows import rows_of_run
from lora_llava.splits.encoded_sources import show_progress
from lora_llava.splits.seen_rows import SEEN_FILE
from lora_llava.splits.split_rows import Split, read_held_out


@dataclass(frozen=True)
class EvaluationOptions:
    """How a model is evaluated.

    Attributes:
        method: `generate` lets the model write the answer; `loglik` picks the likeliest choice.
        prompt: A key of `PROMPTS`, for ScienceQA.
        temperature: See `Sampling`.
        top_p: See `Sampling`.
        shuffled: Whether to shuffle the images among the questions.
        base_only: Whether to evaluate the run's base without its trained weights.
        parser: The parser of ScienceQA's letters, a key of `PARSERS`; None uses the recipe's.
        bad_images: `error`, or `wrong`: a question whose image cannot be opened counts as wrong.
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
        """Suffix of the file names that keeps the results of different options apart."""
        parts = {
            "base": self.base_only,
            "shuffled": self.shuffled,
            self.prompt.replace("-", "_"): self.prompt != "recipe",
            self.method: self.method != "generate",
            "sampled": self.temperature > 0,
        }
        return "".join(f"_{name}" for name, is_set in parts.items() if is_set)


@dataclass(frozen=True)
class OpenedEvaluation:
    """An evaluation before any weight is loaded.

    Attributes:
        recipe: The recipe whose questions are evaluated.
        base: The base model to load, a folder or a Hub id.
        adapter: The run directory with the adapter; None for the base alone.
        plan: The plan of the model.
        tokenizer: The tokenizer of its processor.
        split: The held-out rows.
        name: Name of the split.
        template: The conversation template.
        trained: Rows that the run was trained on, if they are not its own held-out rows and that can be known.
    """

    recipe: Recipe
    base: str
    adapter: Path | None
    plan: ModelPlan
    tokenizer: Any
    split: Split
    name: str
    template: AnyTemplate
    trained: TrainedRows | None = None

    @property
    def science(self) -> bool:
        return self.recipe.data.format == "scienceqa"


def evaluate(
    model: str,
    options: EvaluationOptions | None = None,
    *,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    data: DataFile | None = None,
    limit: int | None = None,
    output: str | None = None,
    server: ChatServer | None = None,
    show_figures: Callable[[dict[str, Any]], None] | None = None,
) -> Table | AnswerTable:
    """Evaluate a model on the held-out questions of a recipe, and write its answers and a summary of the scores.

    Args:
        model: A run directory, a folder with a complete LLaVA, or a Hub id. With a server, a folder supplies only the
            questions, and any other text is the model's name there.
        options: How the model is evaluated; by default `EvaluationOptions()`.
        recipe: The recipe with data, template and evaluation settings; by default the one in the model's folder.
        overrides: `key.sub=value` texts.
        data: Rows to evaluate, all of them, in place of the recipe's held-out rows.
        limit: Highest number of questions.
        output: Folder for the predictions file; by default the model's folder, else the working directory.
        server: The server that answers, in place of a local model.
        show_figures: Called with the figures beside the scores of free answers (`build_figures`).

    Returns:
        The table of scores.

    Raises:
        UserError: If the model, the recipe or the data is missing or does not fit.
    """
    options = options or EvaluationOptions()
    if server is not None:
        server = find_model(server if server.model or Path(model).is_dir() else replace(server, model=model))
    opened = open_evaluation(model, options, recipe, overrides, server, data)
    rows = held_out_rows(opened, options, limit)
    report_asked(opened.split, len(rows), opened.name, opened.recipe, overrides, data, opened.plan.config)
    for line in opened.trained.lines(model) if opened.trained else ():
        report(line)
    if options.method == "loglik" and not opened.science:
        for row in rows:  # before any weight is loaded
            choices_of(row, "", prompt=options.prompt)
    settings = opened.recipe.evaluation or EvaluationSection()
    sampling = Sampling(options.temperature, options.top_p, settings.max_new_tokens, opened.recipe.seed)
    if server is not None and Path(model).is_dir():  # the tokenizer is known
        server = _with_bos(server, opened, rows, model)
    about = _about(opened, options, sampling, server, limit)
    if data is not None:
        about["data_file"] = {"path": str(data.folder), "sha256": data.digest()}
    losses: Callable[[], dict[int, tuple[float, int]]] | None = None
    if server is not None:
        answerer = by_server(server, opened.split.images, sampling, opened.template.stop_string)
    else:
        evaluator = load_evaluator(opened, settings.batch_size)
        answerer = open_answerer(opened, options, evaluator, sampling)
        losses = None if opened.science else partial(reference_losses, evaluator, rows)
    folder = Path(output or (model if Path(model).is_dir() else "."))
    parser = options.parser or settings.parser
    suffix = (
        options.suffix
        + f"_{parser}" * (parser != settings.parser)
        + other_suffix(recipe, overrides, limit, server, data)
    )
    common: dict[str, Any] = {
        "predictions": folder / f"predictions{suffix}.jsonl",
        "description": "evaluating",
        "key": about,
        "bad_images": options.bad_images,
    }
    start = time.monotonic()
    table: Table | AnswerTable
    if opened.science:
        table, scored = evaluate_scienceqa(
            rows, answerer, parser if options.method == "generate" else "llava", **common
        )
    else:
        table, scored = evaluate_conversations(rows, answerer, losses, **common)  # type: ignore[assignment]
    about |= {"model": model, "questions": questions_hash(rows)}
    if data is not None:
        about["data_file"] |= {"rows": opened.split.report.rows, "asked": len(rows)}
    if opened.trained is not None:
        about["trained"] = opened.trained.as_dict()
    found = summarise(table, scored)
    if not opened.science:
        lines: Sequence[Any] = scored
        found["figures"] = build_figures(
            {ANSWERS: lines}, rows, saved_majority(Path(model)), what="held-out rows" if data is None else "rows"
        )
        if show_figures is not None:
            show_figures(found["figures"])
    _write_summary(folder / f"evaluation{suffix}.json", about, found, time.monotonic() - start)
    return table


def _with_bos(server: ChatServer, opened: OpenedEvaluation, rows: Sequence[Conversation], model: str) -> ChatServer:
    """Add the field that makes the server put BOS in front, if it is needed and taken, and report what differs."""
    template, tokens = opened.template, tokens_of(opened.plan.config, opened.split.sizes)
    prompts = sent_prompts(rows, opened.split.images, opened.tokenizer, template, tokens)
    server, lines = match_bos(server, prompts, leading_ids(opened.tokenizer), model)
    for line in lines:
        report(line)
    return server


def load_evaluator(opened: OpenedEvaluation, batch_size: int) -> Evaluator:
    """Load the weights of an opened evaluation, to answer `batch_size` questions at once."""
    stored = opened.recipe.model.quantization
    model = load_answering_model(opened.base, opened.adapter, quantization=stored, dtype=opened.recipe.model.dtype)
    use_canvases(llava_of(model).config, grid_of(opened.plan.config))
    return Evaluator(
        model,
        opened.tokenizer,
        opened.template,
        tokens_of(opened.plan.config, opened.split.sizes),
        opened.split.load_pixels,
        batch_size,
    )


def open_answerer(
    opened: OpenedEvaluation, options: EvaluationOptions, evaluator: Evaluator, sampling: Sampling
) -> Answerer:
    """Return the answerer for these options; `sampling` applies to generated text."""
    if options.method == "generate":
        return by_generation(evaluator, sampling)
    choices = partial(choices_of, prompt=options.prompt)
    if opened.science and reasons_first(options.prompt, opened.recipe.data.prompt_order):
        return by_reasoned_likelihood(evaluator, sampling, choices)
    return by_likelihood(evaluator, choices)


def _write_summary(file: Path, about: dict[str, Any], found: dict[str, Any], seconds: float) -> None:
    questions = next(iter(found["table"].values()))
    count = questions["count"] if "count" in questions else questions["questions"]
    took = {"seconds": round(seconds, 2), "questions": count}
    write_json(file, {**found, "asked": about, "took": took, "machine": machine(), "versions": versions()})


def open_evaluation(
    model: str,
    options: EvaluationOptions,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    server: ChatServer | None = None,
    data: DataFile | None = None,
) -> OpenedEvaluation:
    """Open everything that an evaluation needs except the weights; arguments and errors are those of `evaluate`."""
    folder = Path(model)
    if server is None:
        check_run(model, "a run, a folder with a complete LLaVA, or a Hub id", hub=True)
    run = is_run(folder)
    chosen = choose_recipe(model, run, recipe, overrides, server, data)
    _check_options(options, chosen)
    if server is not None and (options.method != "generate" or options.base_only):
        raise UserError("--method loglik and --base-only need a local model; leave them out with --server")
    if server is None and chosen.model.quantization == "nf4":
        check_bitsandbytes()
    if options.base_only and not run:
        raise UserError(f"--base-only: {model} is a complete model, not a run with an adapter; leave the flag out")
    base = str(checked_base(read_record(folder), folder)) if run else model
    elsewhere = server is not None and not folder.is_dir()
    plan = plan_model(chosen.model if elsewhere else as_llava(chosen.model, base))
    if run:
        use_tiles_of_run(plan.config, folder, chosen.model.max_tiles)
    tokenizer, processor, template = build_run_processor(chosen, plan, trained=True)
    seen = earlier_of(folder, recipe, chosen, processor, template, plan) if data is None else None
    read = partial(read_held_out, chosen, processor, template, plan.config, seen=seen)
    name, split = read(trusted=options.bad_images == "wrong")
    other_data = data is not None or any(text.startswith(OTHER_DATA) for text in overrides)
    if run and recipe is None and not other_data:
        if options.bad_images == "wrong" and not are_same_rows(folder, chosen, split):
            name, split = read()  # the run itself may have left rows out by its own rule for images
        check_same_rows(folder, chosen, split)
    trained = None
    if other_data and (run or (folder / SEEN_FILE).is_file()):
        trained = count_trained(split, rows_of_run(model, processor, template, plan.config, show_progress))
    adapter = folder if run and not options.base_only else None
    return OpenedEvaluation(chosen, base, adapter, plan, tokenizer, split, name, template, trained)


def _check_options(options: EvaluationOptions, recipe: Recipe) -> None:
    if options.prompt not in PROMPTS:
        raise UserError(f"--prompt: {options.prompt!r} is unknown; use one of {', '.join(PROMPTS)}")
    if options.prompt != "recipe" and recipe.data.format != "scienceqa":
        raise UserError(
            f"--prompt {options.prompt} is for ScienceQA; leave it out with data.format {recipe.data.format}"
        )
    if options.parser is not None and (options.method == "loglik" or recipe.data.format != "scienceqa"):
        raise UserError(
            f"--parser {options.parser} reads letters in generated answers to ScienceQA; leave it out with "
            + ("--method loglik" if options.method == "loglik" else f"data.format {recipe.data.format}")
        )
    if options.method == "loglik" and (options.temperature or options.top_p != 1):
        raise UserError("--temperature and --top-p apply to generated answers; leave them out with --method loglik")


def held_out_rows(opened: OpenedEvaluation, options: EvaluationOptions, limit: int | None = None) -> list[Conversation]:
    """Return the questions in the prompt of the options, at most `limit`, drawn by the recipe's seed."""
    count = limit if limit is not None else "all"
    rows = opened.split.read(choose_rows(range(len(opened.split.rows)), count, opened.recipe.seed))
    if options.shuffled:
        rows = shuffle_images(rows, opened.recipe.seed)
    return [with_prompt(row, options.prompt) for row in rows]


def _about(
    opened: OpenedEvaluation,
    options: EvaluationOptions,
    sampling: Sampling,
    server: ChatServer | None,
    limit: int | None,
) -> dict[str, Any]:
    """Return what the answers depend on besides the questions, so that they can be recognised and reproduced."""
    recipe = opened.recipe
    parser = options.parser or (recipe.evaluation or EvaluationSection()).parser
    about: dict[str, Any] = {
        "way": asdict(options),
        "sampling": asdict(sampling),
        "data": recipe.data.model_dump(mode="json"),
        "split": opened.name,
        "limit": limit,
        "seed": recipe.seed,
    }
    if server is not None:
        about |= {"server": server.url, "served_model": server.model, "fields": dict(server.fields)}
    else:
        about |= {
            "weights": _weights(opened),
            "quantization": recipe.model.quantization,
            "dtype": recipe.model.dtype,
            **({"canvases": grid} if (grid := grid_of(opened.plan.config)) else {}),
            "batch_size": (recipe.evaluation or EvaluationSection()).batch_size,
        }
    if opened.science:
        what = PROMPTS[options.prompt]
        about["prompt"] = {"name": options.prompt, "what": what, "order": recipe.data.prompt_order}
        about["parser"] = "none: the likeliest choice" if options.method == "loglik" else PARSERS[parser]
    else:
        about["marking"] = COMPARED_BY
    return about


def _weights(opened: OpenedEvaluation) -> dict[str, str]:
    """Return the hash of the adapter and the state of the base."""
    found = {"adapter": file_hash(opened.adapter / ADAPTER_FILE)} if opened.adapter is not None else {}
    folder = Path(opened.base)
    return found | {"base": weights_state(folder) if folder.is_dir() else opened.base}


def as_llava(section: ModelSection, base: str) -> ModelSection:
    """Return the model section of a recipe that starts from a base as a complete LLaVA."""
    kept = {name: getattr(section, name) for name in ("quantization", "dtype", "max_tiles")}
    return ModelSection(start_from=StartFrom(llava=base), **kept)
