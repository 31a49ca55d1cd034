"""`lora-llava evaluate`: the table of a run, or of any LLaVA under a recipe: ScienceQA's, or of held-back rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_llava.data.templates import get_template
from lora_llava.errors import UserError
from lora_llava.evaluation.answers import AnswerTable
from lora_llava.evaluation.ask import ask_conversations, ask_scienceqa, choose_rows, shuffle_images
from lora_llava.evaluation.scienceqa import Table
from lora_llava.inference.load import load_answering_model
from lora_llava.model.loading import check_bitsandbytes
from lora_llava.model.provenance import locate_base
from lora_llava.model.start import plan_model
from lora_llava.recipe import EvaluationSection, ModelSection, Recipe, StartFrom, load_recipe
from lora_llava.training.data import Split, read_held_out
from lora_llava.training.plan import build_run_processor
from lora_llava.training.run_directory import RECIPE_FILE, is_run, read_data_hashes, read_record


def evaluate(
    model: str, *, recipe: str | None = None, overrides: Sequence[str] = (), limit: int | None = None,
    shuffled: bool = False, base_only: bool = False, output: str | None = None,
) -> Table | AnswerTable:  # fmt: skip
    """Ask a model the held-out questions of a recipe.

    Args:
        model: A run directory, a folder with a whole LLaVA, or a Hub id.
        recipe: Whose data, template and evaluation to use; by default a run's or merged folder's own.
        overrides: `key.sub=value` texts.
        limit: Most questions.
        shuffled: Exchange the pictures among the questions.
        base_only: The run's base without what was trained.
        output: Folder of the predictions file.

    Returns:
        The table.

    Raises:
        UserError: For a model, recipe or data that is missing or does not fit.
    """
    folder = Path(model)
    run = is_run(folder)
    if recipe is None and not (folder / RECIPE_FILE).is_file():
        raise UserError(
            f"{model} is not a finished run and holds no recipe; name one whose questions to ask with --recipe"
        )
    if not run and recipe is None:  # a merged folder is asked as it is stored
        overrides = ["model.quantization=none", *overrides]
    chosen = load_recipe(recipe or folder / RECIPE_FILE, overrides)
    if chosen.model.quantization == "nf4":
        check_bitsandbytes()
    base = str(locate_base(read_record(folder)["base"], folder)) if run else model
    plan = plan_model(_as_llava(chosen.model, base))
    tokenizer, processor = build_run_processor(chosen, plan.config, plan.tokenizer_folder, plan.image_folder)
    split = read_held_out(chosen, processor, plan.config)
    other_data = ("data.path=", "data.file=", "data.format=", "data.sources")
    if run and recipe is None and not any(text.startswith(other_data) for text in overrides):
        _check_same_rows(folder, chosen, split)
    rows = split.read(choose_rows(range(len(split.rows)), limit if limit is not None else "all", chosen.seed))
    if shuffled:
        rows = shuffle_images(rows, chosen.seed)
    answering = load_answering_model(
        base, folder if run and not base_only else None, quantization=chosen.model.quantization,
        dtype=chosen.model.dtype,
    )  # fmt: skip
    settings = chosen.evaluation or EvaluationSection()
    name = "predictions" + "_base" * base_only + "_shuffled" * shuffled
    ask = ask_scienceqa if chosen.data.format == "scienceqa" else ask_conversations
    return ask(
        answering,
        rows,
        split.pictures,
        tokenizer=tokenizer,
        template=get_template(chosen.data.template, chosen.data.system_prompt),
        num_image_tokens=plan.config.image_seq_length,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        predictions=Path(output or (folder if folder.is_dir() else ".")) / f"{name}.jsonl",
        description="evaluating",
    )


def _check_same_rows(folder: Path, recipe: Recipe, split: Split) -> None:
    """Hold that rows that were drawn from the training data are those that the run held back.

    Raises:
        UserError: Where the data has changed since: it may have been trained on.
    """
    data = recipe.data
    asked = "test" if data.test_rows else "validation"
    own = data.test_source or (data.validation_source and asked == "validation")
    known = read_data_hashes(folder).get(asked)
    if data.format == "conversations" and not own and known not in (None, split.fingerprint()):
        raise UserError(
            f"{folder}: the data is not what it was: the rows that would be held back now may have been trained on; "
            "restore it, or name rows to ask with data.test_rows=0 data.test_source={path: FILE}"
        )


def _as_llava(section: ModelSection, base: str) -> ModelSection:
    """The model section of the complete LLaVA that a base is."""
    return ModelSection(start_from=StartFrom(llava=base), quantization=section.quantization, dtype=section.dtype)
