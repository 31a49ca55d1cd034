"""The Python API: train, evaluate, merge and query models with the results and errors of the command line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_llava.core.errors import UserError
from lora_llava.core.quiet import quieten
from lora_llava.recipe import Recipe, find_recipe, load_recipe, override_recipe

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

Overrides = Mapping[str, Any] | Iterable[str]
"""`{"training.max_steps": 50}`, or texts as on the command line: `["training.max_steps=50"]`."""


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        path: The run directory.
        metrics: The content of `metrics.json`: scores before and after, losses, speed, memory.
    """

    path: Path
    metrics: dict[str, Any] = field(repr=False)


def finetune(
    recipe: str | Path | Recipe,
    *,
    overrides: Overrides = (),
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: Iterable[str] = (),
    quiet: bool = False,
) -> Run:
    """Train a recipe, and score the model before and after.

    Args:
        recipe: A recipe file, the name of a shipped recipe, or a recipe from `load_recipe`.
        overrides: Values that replace the recipe's.
        resume: Resume from the newest complete checkpoint.
        overwrite: Replace a run in `output_dir`, finished or not.
        accept_changes: With `resume`, recipe keys that may differ from the checkpoint's.
        quiet: Print nothing, progress bars included.

    Returns:
        The finished run.

    Raises:
        UserError: For a mistake in the recipe, its data or its model, before a weight is loaded.
    """
    chosen, folder = _read_recipe(recipe, overrides)
    with _output(quiet) as console:
        from lora_llava.training.finetune import finetune as train

        metrics = train(
            chosen, folder, resume=resume, overwrite=overwrite, accept_changes=accept_changes, console=console
        )
    return Run(Path(chosen.output_dir), metrics)


def evaluate(
    model: str | Path,
    *,
    data: str | Path | None = None,
    images: str | Path | None = None,
    recipe: str | Path | None = None,
    overrides: Overrides = (),
    method: Literal["generate", "loglik"] = "generate",
    temperature: float = 0.0,
    shuffle_images: bool = False,
    base_only: bool = False,
    limit: int | None = None,
    output: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Answer questions with a model and score the answers.

    Args:
        model: A run directory, a folder with a complete LLaVA, or a Hub id.
        data: A file of rows to answer, all of them, in place of the recipe's held-out rows.
        images: Folder of the images that `data` names; default: `images` beside the file, or the file's folder.
        recipe: Recipe with the data and evaluation to use; default: the run's own.
        overrides: Values that replace the recipe's.
        method: `generate` lets the model write, `loglik` takes the most likely choice.
        temperature: 0 is greedy.
        shuffle_images: Shuffle the images among the questions; a model that looks must get worse.
        base_only: Evaluate the run's base without its adapter and projector.
        limit: Number of questions at most, drawn by the recipe's seed.
        output: Folder for predictions; default: the run directory.
        quiet: Print nothing, progress bars included.

    Returns:
        The table of scores, as `lora-llava evaluate --json` prints it.

    Raises:
        UserError: For a model, recipe or data that is missing or does not fit.
    """
    texts = _override_texts(overrides)
    if method not in ("generate", "loglik"):
        raise UserError(f"method: {method!r} is unknown; use generate or loglik")
    if images is not None and data is None:
        raise UserError("images: it needs data; name the file of rows, or leave images out")
    with _output(quiet):
        from lora_llava.evaluation.asked.data_file import DataFile
        from lora_llava.evaluation.evaluate import EvaluationOptions
        from lora_llava.evaluation.evaluate import evaluate as score

        options = EvaluationOptions(
            method=method, temperature=temperature, shuffled=shuffle_images, base_only=base_only
        )
        named = None if recipe is None else str(recipe)
        target = None if output is None else str(output)
        rows = DataFile(Path(data), Path(images) if images is not None else None) if data is not None else None
        return dict(score(str(model), options, recipe=named, overrides=texts, data=rows, limit=limit, output=target))


def merge(
    run: str | Path,
    output: str | Path,
    *,
    base: Literal["bf16", "nf4"] = "bf16",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    projector_only: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Merge a run's adapter into its base as one stock folder, and verify it.

    Args:
        run: A run directory.
        output: The new folder, which must not exist.
        base: Merge into the base's own weights, or into their values after NF4.
        dtype: Dtype of the new weights.
        projector_only: Merge the projector alone, and keep LoRA as an adapter beside it.
        quiet: Print nothing.

    Returns:
        The content of `merge_report.json`: differences from base and adapter, tolerance, prompts.

    Raises:
        ProofError: Where the merged model differs from base and adapter by more than the tolerance.
        UserError: For a run, base or disk that does not fit.
    """
    with _output(quiet) as console:
        from lora_llava.publishing.merge import merge as merge_run

        return merge_run(
            Path(run), Path(output), base=base, dtype=dtype, projector_only=projector_only, console=console
        )


@dataclass(frozen=True)
class Model:
    """A loaded model that answers questions; made by `load_model`."""

    _speaker: Any = field(repr=False)
    name: str = ""

    def answer(
        self,
        question: str,
        image: str | Path | Image | Sequence[str | Path | Image] = (),
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> str:
        """Answer one question.

        Args:
            question: The text.
            image: An image file or a PIL image, or several of them.
            system: System text in place of the template's own.
            max_new_tokens: Length of the answer in tokens at most.
            temperature: 0 is greedy.
            top_p: Draw among the most likely tokens that have this share.
            seed: Seed of the drawing.

        Returns:
            The answer.

        Raises:
            UserError: For an image that cannot be read, or a question that is too long for the model.
        """
        from lora_llava.inference.sampling import Sampling
        from lora_llava.inference.speak import stream_answer, text_message, user_message

        given = [image] if isinstance(image, str | Path) or not isinstance(image, Sequence) else image
        messages = [text_message("system", system)] if system else []
        messages.append(user_message(question, [self._open(one) for one in given]))
        return "".join(stream_answer(self._speaker, messages, Sampling(temperature, top_p, max_new_tokens, seed)))

    def _open(self, image: str | Path | Image) -> Image:
        from lora_llava.data.images.to_rgb import to_rgb
        from lora_llava.inference.chat import open_images

        if not isinstance(image, str | Path) and not hasattr(image, "convert"):
            raise UserError(f"image: {type(image).__name__} is not an image; give a path or a PIL image")
        if isinstance(image, str | Path):
            return open_images([image], self._speaker.background)[0].image
        return to_rgb(image, self._speaker.background).image


def load_model(
    model: str | Path,
    *,
    quantization: Literal["auto", "nf4", "none"] = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    template: str | None = None,
    quiet: bool = False,
) -> Model:
    """Load a model that answers questions.

    Args:
        model: A run directory, a folder with a complete LLaVA, or a Hub id.
        quantization: Of the language model; `auto` is the run's own, and none for a complete model.
        dtype: Of the computation; `auto` is the run's own, else bfloat16 on a GPU, float16 on one without bfloat16, and
            float32 on a CPU.
        template: Conversation template in place of the processor's own.
        quiet: Print nothing, progress bars included.

    Raises:
        UserError: For a model that is missing, does not fit its base, or has no chat template.
    """
    with _output(quiet):
        from lora_llava.inference.open_model import open_speaker

        speaker = open_speaker(str(model), quantization=quantization, dtype=dtype, template=template)
    return Model(speaker, str(model))


def _read_recipe(recipe: str | Path | Recipe, overrides: Overrides) -> tuple[Recipe, Path]:
    """Return the recipe with its overrides, and the folder in which its Stage 1 recipe is looked up."""
    texts = _override_texts(overrides)
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, texts), find_recipe(recipe).parent
    return override_recipe(recipe, texts), Path()


def _override_texts(overrides: Overrides) -> list[str]:
    """Return overrides as on the command line; JSON values are YAML as well."""
    if isinstance(overrides, str):
        return [overrides]
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    return list(overrides)


@contextlib.contextmanager
def _output(quiet: bool) -> Iterator[Console]:
    """Give a console; where `quiet`, nothing at all is printed inside."""
    from rich.console import Console

    quieten()
    console = Console(highlight=False, markup=False, quiet=quiet or os.environ.get("RANK", "0") != "0")
    if not quiet:
        yield console
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield console
