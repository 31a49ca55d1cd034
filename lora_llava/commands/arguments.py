"""Arguments that several verbs share: a recipe, paths, counts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the recipe argument and its overrides."""
    parser.add_argument("recipe", type=home, help="recipe file, or the name of a shipped recipe")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `key.sub=value` arguments."""
    parser.add_argument(
        "overrides", nargs="*", default=(), metavar="key.sub=value", help="replace values of the recipe"
    )


def add_letter_parser(parser: argparse.ArgumentParser) -> None:
    """Add `--parser`, the rule that reads ScienceQA's answer letters."""
    parser.add_argument(
        "--parser",
        choices=["llava", "lenient"],
        help="rule that reads ScienceQA's answer letters: LLaVA's own, or a lenient one that also accepts b, (B), "
        '**B**, "answer: B" and the text of the choice; default: the recipe\'s, else llava',
    )


def add_published(parser: argparse.ArgumentParser) -> None:
    """Add `--published`, which prints published scores below the table."""
    parser.add_argument(
        "--published",
        action="store_true",
        help="print published ScienceQA scores below the table; by default only if all 4,241 test questions were "
        "answered",
    )


def add_caps(parser: argparse.ArgumentParser) -> None:
    """Add the caps on cost and requests."""
    parser.add_argument(
        "--max-cost",
        type=float,
        metavar="USD",
        help="stop before this run and earlier capped runs together cost more, failed requests included; default: no "
        "cap",
    )
    parser.add_argument(
        "--max-requests",
        type=positive,
        metavar="N",
        help="stop this run after N requests, retries included; default: no cap",
    )


def home(text: str) -> str:
    """Expand `~` in a path; a shell does not expand it in `--output=~/x`. A Hub id is returned unchanged."""
    return os.path.expanduser(text)


def a_path(text: str) -> Path:
    """Convert an argument to a path, with `~` expanded."""
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
