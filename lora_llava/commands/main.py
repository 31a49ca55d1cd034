"""`lora-llava VERB`, and the same verbs as scripts/VERB.py."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lora_llava import __version__
from lora_llava.commands import chat as cli_chat
from lora_llava.commands import cli_data, cli_evaluation, cli_synthesis
from lora_llava.commands.cli_data import a_path, add_recipe, home, positive
from lora_llava.core.errors import ToldError
from lora_llava.core.quiet import quieten

# Heavy imports stand inside the verbs, so that `--help` and usage errors answer at once.


def _console() -> Any:
    from rich.console import Console

    first = os.environ.get("RANK", "0") == "0"  # set by torchrun and accelerate launch: the others have nothing to tell
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False, quiet=not first)


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, load no weights")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a run, finished or not")
    parser.add_argument(
        "--accept-changes", metavar="KEY,KEY", default="", help="with --resume: keys of the recipe that may be others "
        "than before, such as training.learning_rate",
    )  # fmt: skip


def _finetune(args: argparse.Namespace) -> None:
    from lora_llava.recipe import find_recipe, load_recipe

    recipe = load_recipe(args.recipe, args.overrides)  # before the heavy imports: a typo is told at once
    quieten()
    from lora_llava.training.finetune import dry_run, finetune

    folder = find_recipe(args.recipe).parent
    console = _console()
    if args.dry_run:
        dry_run(recipe, folder, console)
        return
    accepted = [key.strip() for key in args.accept_changes.split(",") if key.strip()]
    finetune(recipe, folder, resume=args.resume, overwrite=args.overwrite, accept_changes=accepted, console=console)
    if recipe.stage == 2:
        console.print("next:")
        for command in _next_commands(recipe.output_dir):
            console.print(f"  {command}", soft_wrap=True)


def _plan(args: argparse.Namespace) -> None:
    from lora_llava.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    quieten()
    from lora_llava.commands.plan import print_forecast

    print_forecast(recipe, _console())


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=["tiny", "tiny_body", "7b", "13b"], default="tiny", help="random weights")
    parser.add_argument("--batch-size", type=positive, default=8, help="samples of an optimiser step, on every side")
    parser.add_argument("--steps", type=positive, default=3, help="timed steps of a run; one before them is not")
    parser.add_argument("--repeats", type=positive, default=2, help="runs of each side; the fastest counts")
    parser.add_argument("--r", type=positive, default=16, help="rank of the adapters")
    parser.add_argument("--cap-gb", type=float, help="GPU memory in GiB that torch may take")
    sides = ["ours", "ours_cached", "trl_random", "trl_grouped"]
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides, help="default: all")
    parser.add_argument("--json", type=a_path, metavar="FILE", help="file for machine, versions and results")


def _benchmark(args: argparse.Namespace) -> None:
    quieten()
    from lora_llava.commands.benchmark import benchmark

    benchmark(
        shape=args.shape, batch_size=args.batch_size, steps=args.steps, repeats=args.repeats, r=args.r,
        cap_gb=args.cap_gb, sides=args.sides, output=args.json, console=_console(),
    )  # fmt: skip


def _next_commands(run: str) -> list[str]:
    merged = shlex.quote(f"{run}-merged")
    run = shlex.quote(run)
    commands = {
        "evaluate": f"lora-llava evaluate {run}",
        "chat": f"lora-llava chat {run}",
        "merge": f"lora-llava merge {run} --output {merged}",
        "push": f"lora-llava push {merged} YOU/NAME --dry-run",
    }
    return [command for verb, command in commands.items() if verb in VERBS]


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--copy", metavar="FOLDER", type=a_path, help="copy the shipped recipes there")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of a recipe")


def _recipes(args: argparse.Namespace) -> None:
    from lora_llava.recipe import copy_recipes, json_schema, load_generate_recipe, load_recipe, shipped_recipes
    from lora_llava.recipe import shipped_generate_recipes as makers

    if args.schema:
        print(json_schema(), end="")
    elif args.copy:
        written = copy_recipes(args.copy)
        print(f"{len(written)} files written to {args.copy}")
    else:
        for path in shipped_recipes():
            recipe = load_recipe(path)
            model = recipe.model.start_from.llava or recipe.model.llm
            print(f"{path.name:38} stage {recipe.stage}  {model}")
        for path in makers():
            print(f"{path.name:38} data     {load_generate_recipe(path).teacher.backend}")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=a_path, help="a run directory")
    parser.add_argument("--output", type=a_path, required=True, help="the new folder")
    parser.add_argument(
        "--base", choices=["bf16", "nf4"], default="bf16", help="merge into the base's own weights, or into what NF4 "
        "makes of them",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="what the folder stores")
    parser.add_argument(
        "--projector-only", action="store_true", help="put the projector into OUTPUT/base and keep LoRA as "
        "OUTPUT/adapter, for servers that load adapters without modules_to_save",
    )  # fmt: skip
    parser.add_argument("--prompts", type=positive, default=4, help="prompts of each kind, with and without picture")


def _merge(args: argparse.Namespace) -> None:
    quieten()
    from lora_llava.publishing.merge import merge

    console = _console()
    merge(
        args.run, args.output, base=args.base, dtype=args.dtype, projector_only=args.projector_only,
        prompts=args.prompts, console=console,
    )  # fmt: skip


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=a_path, help="a checkpoint or LoRA folder of github.com/haotian-liu/LLaVA")
    parser.add_argument("--output", type=a_path, required=True, help="the new folder")
    parser.add_argument("--llm", type=home, help="language model a LoRA folder stands on; default: what it says")
    parser.add_argument("--vision-tower", type=home, help="CLIP tower, a folder or Hub id; default: what it says")
    parser.add_argument(
        "--base", type=home, help="complete stock LLaVA that a LoRA folder stands on, in place of --llm"
    )
    parser.add_argument("--template", default="vicuna_v1", help="conversation template it was trained with")


def _import(args: argparse.Namespace) -> None:
    quieten()
    from lora_llava.publishing.import_llava import import_llava

    import_llava(
        args.folder, args.output, llm=args.llm, vision_tower=args.vision_tower, base=args.base, template=args.template,
        console=_console(),
    )  # fmt: skip


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=a_path, help="a run directory, or a folder with a whole LLaVA")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="the repository on the Hub; made if it is not there")
    parser.add_argument("--public", action="store_true", help="make a new repository public; the default is private")
    parser.add_argument("--base-repo", metavar="OWNER/NAME", help="push the run's local base there first")
    parser.add_argument("--replace", action="store_true", help="put this in the place of another model")
    parser.add_argument("--license", help="the card's licence, as Hugging Face writes it, such as apache-2.0")
    parser.add_argument("--dry-run", action="store_true", help="print files and card, send nothing")


def _push(args: argparse.Namespace) -> None:
    quieten()
    from lora_llava.publishing.push import push

    push(
        args.model, args.repo_id, public=args.public, base_repo=args.base_repo, replace=args.replace,
        licence=args.license, dry_run=args.dry_run, console=_console(),
    )  # fmt: skip


def _add_build_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=a_path, required=True, help="folder for llm/ and vision_tower/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--llm-steps", type=positive, help="fewer steps, for a try")
    parser.add_argument("--clip-steps", type=positive, help="fewer steps, for a try")


def _build_demo(args: argparse.Namespace) -> None:
    quieten()
    from lora_llava.demo.build import CLIP_STEPS, LLM_STEPS, build_demo

    seconds = build_demo(args.output, args.seed, args.llm_steps or LLM_STEPS, args.clip_steps or CLIP_STEPS)
    print(f"written to {args.output}: " + ", ".join(f"{name} in {value:.0f} s" for name, value in seconds.items()))


def _with_console(run: Callable[[argparse.Namespace, Any], int]) -> Callable[[argparse.Namespace], int]:
    return lambda args: run(args, _console())


Run = Callable[[argparse.Namespace], int | None]
"""Runs a verb; what it returns is the exit code, None is 0."""

VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Run]] = {
    "init": (
        "write a recipe for a folder of your own pictures and questions, and check it",
        cli_data.add_init,
        _with_console(cli_data.run_init),
    ),
    "check": (
        "read everything that training will read, and say what is wrong with it",
        cli_data.add_check,
        _with_console(cli_data.run_check),
    ),
    "preview": (
        "show samples as they are trained, as a page or on the terminal",
        cli_data.add_preview,
        _with_console(cli_data.run_preview),
    ),
    "finetune": ("run a recipe: train, and score before and after", _add_finetune, _finetune),
    "plan": ("say what a recipe takes: memory by part, cards it fits, steps, time", add_recipe, _plan),
    "benchmark": ("time training here, ours and TRL's, on rows of ScienceQA's lengths", _add_benchmark, _benchmark),
    "evaluate": (
        "ask a model the test questions of a recipe and score it",
        cli_evaluation.add_evaluate,
        _with_console(cli_evaluation.run_evaluate),
    ),
    "score": ("score a file of answers", cli_evaluation.add_score, _with_console(cli_evaluation.run_score)),
    "chat": ("talk with a model, on the terminal or on a page", cli_chat.add_chat, _with_console(cli_chat.run_chat)),
    "compare": (
        "put runs beside each other: seeds averaged, paired tests, as a table for terminal, Markdown or LaTeX",
        cli_evaluation.add_compare,
        _with_console(cli_evaluation.run_compare),
    ),
    "report": (
        "write a run's page again: curves, tables, answers with their pictures",
        cli_evaluation.add_report,
        _with_console(cli_evaluation.run_report),
    ),
    "generate-data": (
        "make conversations about pictures from captions and boxes",
        cli_synthesis.add_generate_data,
        _with_console(cli_synthesis.run_generate_data),
    ),
    "merge": ("merge a run into its base as one stock folder, and prove it", _add_merge, _merge),
    "import": ("bring LLaVA's own checkpoint or LoRA folder into stock form", _add_import, _import),
    "push": ("push a run or a merged folder to the Hugging Face Hub, with a model card", _add_push, _push),
    "filter-captions": (
        "choose captions that cover the noun phrases of a large set, as LLaVA chose 595K of CC3M",
        cli_data.add_filter_captions,
        _with_console(cli_data.run_filter_captions),
    ),
    "recipes": ("list or copy the shipped recipes", _add_recipes, _recipes),
    "build-demo": ("pre-train the demo's base from a seed", _add_build_demo, _build_demo),
}


def main(verb: str | None = None, argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        verb: Set by scripts/VERB.py; else the first argument names it.
        argv: Arguments; those of the process where None.

    Returns:
        The exit code: 0, 1 where a check found errors, 2 for a mistake in a call, recipe or file, 3 for a
        loss that is not a number, 128 and the signal's number after a signal: 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if verb is None and argv and argv[0].replace("_", "-") in VERBS:  # generate_data, as its script is called
        argv[0] = argv[0].replace("_", "-")
    parser = argparse.ArgumentParser(prog="lora-llava", description="Fine-tune LLaVA with LoRA and QLoRA.")
    parser.add_argument("--version", action="version", version=f"lora-llava {__version__}")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (summary, add_arguments, _) in VERBS.items():
        add_arguments(commands.add_parser(name, help=summary, description=summary, allow_abbrev=False))
    args, rest = parser.parse_known_args(argv if verb is None else [verb, *argv])
    if hasattr(args, "overrides"):  # argparse gives up on those that stand behind an option
        args.overrides = [*args.overrides, *(text for text in rest if "=" in text and not text.startswith("-"))]
        rest = [text for text in rest if text not in args.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return VERBS[args.verb][2](args) or 0
    except ToldError as error:
        prefix = "error: " if error.exit_code == 2 else ""
        print("\n".join(prefix + line for line in str(error).splitlines()), file=sys.stderr)
        return error.exit_code
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        print(f"error: {error.filename}: {error.strerror}; name another place", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno == errno.EROFS:
            print(f"error: {error.filename}: {error.strerror}; name another place", file=sys.stderr)
            return 2
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print("error: the disk is full; free some, then run the same command again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def console_main() -> None:
    """The `lora-llava` command."""
    sys.exit(main())


if __name__ == "__main__":
    console_main()
