"""The verbs that look after data: init, check, preview, filter-captions."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from lora_llava.core.quiet import quieten

# Heavy imports stand inside the verbs, so that `--help` and usage errors answer at once.


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The arguments of a verb that takes a recipe."""
    parser.add_argument("recipe", type=home, help="a recipe file, or the name of a shipped one")
    parser.add_argument(
        "overrides", nargs="*", default=(), metavar="key.sub=value", help="replace values of the recipe"
    )


def home(text: str) -> str:
    """A path or a Hub id for argparse; a shell leaves the `~` of `--output=~/x` to the command."""
    return os.path.expanduser(text)


def a_path(text: str) -> Path:
    """A path for argparse, its `~` the home folder."""
    return Path(home(text))


def positive(text: str) -> int:
    """A count for argparse.

    Raises:
        argparse.ArgumentTypeError: For a number below 1.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} should be 1 or more")
    return number


def add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=a_path, help="with your pictures and a table or JSON of questions and answers")
    parser.add_argument("--data", type=a_path, help="the file of rows, where the folder has several")
    parser.add_argument("--model", type=home, help="a complete LLaVA to start from, a folder or Hub id, or demo")
    parser.add_argument(
        "--recipe",
        type=home,
        help="shipped recipe to fill in: my_data_qlora.yaml, or my_data_8gb.yaml for a small card",
    )
    parser.add_argument("--example", action="store_true", help="make the folder first, with drawn pictures, to try it")
    parser.add_argument(
        "--follow-links", action="store_true", help="read images that links in the folder lead to, outside it too"
    )


def run_init(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.commands.init import init

    _, report = init(
        args.folder, data=args.data, model=args.model, template=args.recipe, example=args.example,
        follow_links=args.follow_links, console=console,
    )  # fmt: skip
    return 1 if report.errors else 0


def add_check(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--json", type=a_path, metavar="FILE", help="where the findings go")
    parser.add_argument("--fix", action="store_true", help="write a cleaned copy beside each file of rows")


def run_check(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    quieten()
    from lora_llava.commands.check import check

    return 1 if check(recipe, json_file=args.json, fix=args.fix, console=console).errors else 0


def add_preview(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=a_path, metavar="FILE", help="the page; default: preview.html")
    parser.add_argument("--samples", type=positive, default=50, help="how many")
    parser.add_argument("--split", choices=["train", "validation", "test"], default="train")
    where.add_argument("--terminal", action="store_true", help="print them here instead")


def run_preview(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.recipe import find_recipe, load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    quieten()
    from lora_llava.commands.preview import preview

    output = None if args.terminal else args.output or Path("preview.html")
    name = str(find_recipe(args.recipe))
    preview(recipe, name=name, split=args.split, samples=args.samples, output=output, console=console)
    return 0


def add_filter_captions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "captions", type=a_path, help="JSON, JSONL, CSV, TSV or Parquet of captions, or LLaVA's chat.json"
    )
    parser.add_argument("--output", type=a_path, required=True, help="the chosen rows, .json or .jsonl")
    parser.add_argument("--caption-column", default="caption", help="what rows call their caption")
    parser.add_argument("--minimum", type=positive, default=3, help="noun phrases in fewer captions are skipped")
    parser.add_argument("--maximum", type=positive, default=100, help="captions taken of a frequent noun phrase")
    parser.add_argument("--seed", type=int, default=0, help="draws them")
    parser.add_argument("--tagger", choices=["auto", "spacy", "light"], default="auto", help="finds noun phrases")


def run_filter_captions(args: argparse.Namespace, console: Any) -> int:
    from rich.table import Table
    from tqdm import tqdm

    from lora_llava.data.concepts.concept_files import filter_caption_file
    from lora_llava.data.concepts.noun_phrases import load_noun_phrases

    noun_phrases = load_noun_phrases(args.tagger)
    console.print(f"noun phrases by the {noun_phrases.name} tagger")
    report = filter_caption_file(
        args.captions, args.output, noun_phrases=noun_phrases, column=args.caption_column, minimum=args.minimum,
        maximum=args.maximum, seed=args.seed, progress=lambda rows: tqdm(rows, unit="caption", dynamic_ncols=True),
    )  # fmt: skip
    table = Table(title="The most frequent noun phrases", title_justify="left")
    table.add_column("noun phrase")
    table.add_column("captions", justify="right")
    table.add_column("kept", justify="right")
    for entry in report.most_frequent:
        table.add_row(entry.phrase, f"{entry.before:,}", f"{entry.after:,}")
    console.print(table)
    console.print("a kept caption brings its other noun phrases along: more than the cap may be kept of one")
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items()) or "none"
    console.print(
        f"{report.phrases:,} noun phrases, {report.rare_phrases:,} of fewer than {args.minimum} captions, "
        f"{report.capped_phrases:,} of more than {args.maximum}"
    )
    console.print(f"{args.output}: {report.kept:,} of {report.rows:,} rows; left out: {left_out}", soft_wrap=True)
    return 0
