"""`lora-llava generate-data`: generate a data set of conversations from a recipe."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lora_llava.core.errors import UserError
from lora_llava.core.storage import SUMS_FILE
from lora_llava.inference.client.answer_store import AnswerStore
from lora_llava.inference.client.budget import Budget, estimate_tokens
from lora_llava.inference.client.chat_request import ChatRequest
from lora_llava.inference.client.client import ChatServer, find_model
from lora_llava.recipe import ContextsSection, GenerateRecipe, dump_recipe, recipe_hash
from lora_llava.recipe.io import RECIPE_FILE
from lora_llava.synthesis.contexts.reading_contexts import Contexts, read_contexts
from lora_llava.synthesis.gates.gates import Limits
from lora_llava.synthesis.output import write_set
from lora_llava.synthesis.pipeline import PipelineSettings, SampleGenerator, write_request
from lora_llava.synthesis.prompts import Prompt, load_prompts, prompt_hashes
from lora_llava.synthesis.sample import FLAVOURS, Flavour, Task
from lora_llava.synthesis.tasks import Tasks, plan_tasks
from lora_llava.synthesis.teachers.teacher import Teacher, by_server

DEMO = "demo"
LEDGER_FILE = "ledger.sqlite"
_ESTIMATED = 200
"""Number of requests from which the token count of all is extrapolated."""


def generate(
    recipe: GenerateRecipe, *, max_cost: float | None = None, max_requests: int | None = None, console: Console
) -> dict[str, Any]:
    """Generate a data set, or resume one.

    Args:
        recipe: The recipe.
        max_cost: Cap on USD, which includes the spending of earlier runs of the same set that had a cap.
        max_requests: Cap on the requests of this run, retries included.
        console: Receives progress messages.

    Returns:
        The summary as in `summary.json`; `complete` states whether every sample was accepted or given up.

    Raises:
        UserError: If files, prompts or the teacher are missing or invalid, or the output folder cannot be written.
    """
    teacher = recipe.teacher
    budget = Budget(teacher.price_in, teacher.price_out, max_cost, max_requests)
    recipe, contexts, tasks, prompts = _plan(recipe, console)
    settings, write = _open_teacher(recipe)
    folder = Path(recipe.output_dir)
    with AnswerStore(folder / LEDGER_FILE) as ledger:
        _save_recipe(recipe, folder)
        budget.before = ledger.spent_under_caps()
        if budget.capped and budget.before:
            console.print(f"earlier runs spent {budget.before:.4f} USD of --max-cost {max_cost:g}")
        generator = SampleGenerator(contexts, tasks, prompts, settings, ledger)
        try:
            generator.run(write, budget)
        except KeyboardInterrupt:
            console.print(f"stopped; {ledger.totals()['answers']} answers are saved; run the same command to resume")
            raise
        if reason := budget.why_stopped():
            console.print(reason, soft_wrap=True)
        about = {"ledger": ledger.totals(), "prompts": prompt_hashes(dict(prompts)), "recipe_hash": recipe_hash(recipe)}
        return write_set(
            folder,
            results=generator.results(),
            contexts=contexts,
            recipe=recipe,
            about=about,
            answer_of=generator.answer_of,
        )


def dry_run(recipe: GenerateRecipe, console: Console) -> None:
    """Print a full prompt of each flavour and an estimate of tokens and USD, without sending anything.

    Raises:
        UserError: As in `generate`, except for errors of the teacher, which is not contacted.
    """
    budget = Budget(recipe.teacher.price_in, recipe.teacher.price_out)
    recipe, contexts, tasks, prompts = _plan(recipe, console)
    settings = _settings(recipe, recipe.teacher.model or recipe.teacher.backend)

    def request(task: Task) -> ChatRequest:
        return write_request(task, contexts[task.place], prompts[task.flavour], settings)

    for flavour in [flavour for flavour in FLAVOURS if tasks.counts().get(flavour)]:
        task = next(task for task in tasks if task.flavour == flavour)
        console.rule(Text(task.task_id))
        for message in request(task).messages:
            console.print(Text(f"[{message['role']}]\n{message['content']}\n"), soft_wrap=True)
    console.rule()
    sampled = [request(task) for task in islice(tasks, 0, None, max(1, len(tasks) // _ESTIMATED))]
    console.print(_estimate(sampled, len(tasks), budget), soft_wrap=True)


def _plan(recipe: GenerateRecipe, console: Console) -> tuple[GenerateRecipe, Contexts, Tasks, Mapping[Flavour, Prompt]]:
    """Read the contexts, plan the tasks and load the prompts; returns the recipe with the demo's paths filled in."""
    recipe = _with_demo(recipe)
    section = recipe.contexts
    contexts = _read(section)
    console.print(f"contexts: {contexts.report}", soft_wrap=True)
    weights: dict[Flavour, float] = {flavour: getattr(recipe.flavours, flavour) for flavour in FLAVOURS}
    tasks = plan_tasks(
        contexts,
        weights=weights,
        samples=recipe.samples,
        samples_per_image=recipe.samples_per_image,
        seed=recipe.seed,
    )
    counts = ", ".join(f"{flavour} {count:,}" for flavour, count in tasks.counts().items())
    console.print(f"samples: {len(tasks):,} ({counts})", soft_wrap=True)
    for flavour, count in tasks.left_out.items():
        if count:
            console.print(f"{count:,} images have too few captions or boxes for {flavour}", soft_wrap=True)
    return recipe, contexts, tasks, load_prompts(Path(recipe.prompts) if recipe.prompts else None)


def _with_demo(recipe: GenerateRecipe) -> GenerateRecipe:
    """Replace `contexts: demo` by the demo's contexts and images, copied into the output folder."""
    if recipe.contexts.contexts != DEMO:
        return recipe
    if recipe.contexts.images:
        raise UserError(
            f"contexts.images: {recipe.contexts.images} is set, but contexts.contexts is demo, which includes its "
            "images; leave out contexts.images"
        )
    from lora_llava.core.storage import cache_folder
    from lora_llava.demo.dataset import build_demo_contexts

    folder = Path(recipe.output_dir)
    file = build_demo_contexts(cache_folder())
    try:
        shutil.copytree(file.parent, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SUMS_FILE))
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}); fix it, or name another output_dir") from None
    update = {"contexts": str(folder / file.name), "images": str(folder / "images")}
    return recipe.model_copy(update={"contexts": recipe.contexts.model_copy(update=update)})


def _read(section: ContextsSection) -> Contexts:
    def path(name: str | None) -> Path | None:
        return Path(name) if name else None

    return read_contexts(
        captions=path(section.captions),
        instances=path(section.instances),
        boxes=path(section.boxes),
        contexts=path(section.contexts),
        columns=section.columns,
        box_format=section.box_format,
        box_unit=section.box_unit,
        images=path(section.images),
        missing_image=section.missing_image,
        where="contexts",
    )


def _settings(recipe: GenerateRecipe, model: str) -> PipelineSettings:
    teacher, gates = recipe.teacher, recipe.gates
    structured = teacher.structured and teacher.backend == "server"
    return PipelineSettings(
        model,
        teacher.max_tokens,
        teacher.temperature,
        teacher.top_p,
        structured,
        gates.max_attempts,
        Limits(gates.min_turns, gates.max_turns, gates.min_words, gates.max_words, gates.max_ungrounded),
        recipe.seed,
    )


def _open_teacher(recipe: GenerateRecipe) -> tuple[PipelineSettings, Teacher]:
    """Connect to or load the teacher of a recipe; returns it with the settings of its requests."""
    teacher = recipe.teacher
    if teacher.backend == "demo":
        from lora_llava.synthesis.teachers.demo_teacher import NAME, answer_by_rules

        return _settings(recipe, NAME), answer_by_rules
    if teacher.backend == "transformers":
        from lora_llava.synthesis.teachers.local_teacher import load_teacher

        name = str(teacher.model)
        return _settings(recipe, name), load_teacher(name, teacher.dtype, teacher.batch_size)
    server = find_model(
        ChatServer(
            str(teacher.url),
            teacher.model,
            concurrency=teacher.concurrency,
            timeout=teacher.timeout,
            retries=teacher.retries,
            requests_per_minute=teacher.requests_per_minute,
            reconnect=teacher.reconnect,
        )
    )
    return _settings(recipe, str(server.model)), by_server(server)


def _save_recipe(recipe: GenerateRecipe, folder: Path) -> None:
    try:
        (folder / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); fix it, or name another output_dir") from None


def _estimate(requests: list[ChatRequest], count: int, budget: Budget) -> str:
    """Extrapolate tokens and cost from a sample of the requests."""
    tokens_in = round(sum(map(estimate_tokens, requests)) / len(requests) * count)
    tokens_out = requests[0].max_tokens * count
    cost = "" if budget.price_in is None else f"; up to {budget.cost(tokens_in, tokens_out):,.2f} USD"
    return (
        f"{count:,} requests, and more if answers are rejected: about {tokens_in:,} prompt tokens (a high estimate, "
        f"from bytes), at most {tokens_out:,} completion tokens{cost}"
    )
