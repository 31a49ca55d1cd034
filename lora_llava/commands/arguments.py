"""Arguments that several verbs share: a recipe, paths, counts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a verb that takes a recipe."""
    parser.add_argument("recipe", type=home, help="a recipe file, or the name of a shipped recipe")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `key.sub=value` arguments."""
    parser.add_argument("overrides", nargs="*", default=(), metavar="key.sub=value", help="replace recipe values")


def add_letter_parser(parser: argparse.ArgumentParser) -> None:
    """Add `--parser`, the rule that reads ScienceQA's answer letters."""
    parser.add_argument(
        "--parser",
        choices=["llava", "lenient"],
        help="how ScienceQA's letters are read: by LLaVA's rule, or also b, (B), **B**, \"answer: B\" and the choice's "
        "text; default: the recipe's, else llava",
    )


def add_published(parser: argparse.ArgumentParser) -> None:
    """Add `--published`, which prints published scores below the table."""
    parser.add_argument(
        "--published",
        action="store_true",
        help="print published ScienceQA scores below; automatic when all 4,241 test questions were answered",
    )


def add_caps(parser: argparse.ArgumentParser) -> None:
    """Add the limits on what a server may cost."""
    parser.add_argument(
        "--max-cost",
        type=float,
        metavar="USD",
        help="stop before this run and earlier capped runs cost more, failed requests included",
    )
    parser.add_argument(
        "--max-requests", type=positive, metavar="N", help="stop this run after N requests, retries included"
    )


def home(text: str) -> str:
    """Expand `~` in a path or Hub id; a shell does not expand it in `--output=~/x`."""
    return os.path.expanduser(text)


def a_path(text: str) -> Path:
    """Convert an argument to a path, with `~` as the home folder."""
    return Path(home(text))


def positive(text: str) -> int:
    """Convert an argument to a count of 1 or more.

    Raises:
        argparse.ArgumentTypeError: For a number below 1.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} should be 1 or more")
    return number
