"""`lora-llava filter-captions`: choose captions that cover the noun phrases of a large set."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path, positive

SUMMARY = "choose captions that cover a large set's noun phrases"
EXAMPLES = (
    "lora-llava filter-captions captions.json --output kept.json",
    "lora-llava filter-captions captions.csv --output kept.json --tagger light",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "captions", type=a_path, help="JSON, JSONL, CSV, TSV or Parquet of captions, or LLaVA's chat.json"
    )
    parser.add_argument(
        "--output",
        type=a_path,
        required=True,
        metavar="FILE",
        help="file for the kept rows, .json or .jsonl (required)",
    )
    parser.add_argument("--caption-column", default="caption", metavar="NAME", help="name of the caption column")
    parser.add_argument(
        "--minimum", type=positive, default=3, metavar="N", help="skip noun phrases found in fewer captions"
    )
    parser.add_argument(
        "--maximum", type=positive, default=100, metavar="N", help="most captions to keep for one noun phrase"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random choice")
    parser.add_argument(
        "--tagger",
        choices=["auto", "spacy", "light"],
        default="auto",
        help="tagger that finds the noun phrases; auto is spacy where it is installed",
    )


def run(args: argparse.Namespace, console: Any) -> int:
    from rich.table import Table

    from lora_llava.core.progress import progress_bar
    from lora_llava.data.concepts.concept_files import filter_caption_file
    from lora_llava.data.concepts.noun_phrases import load_noun_phrases

    noun_phrases = load_noun_phrases(args.tagger)
    console.print(f"noun phrases found by the {noun_phrases.name} tagger")
    report = filter_caption_file(
        args.captions,
        args.output,
        noun_phrases=noun_phrases,
        column=args.caption_column,
        minimum=args.minimum,
        maximum=args.maximum,
        seed=args.seed,
        progress=lambda rows: progress_bar(rows, unit="caption"),
    )
    table = Table(title="The most frequent noun phrases", title_justify="left")
    table.add_column("noun phrase")
    table.add_column("captions", justify="right")
    table.add_column("kept", justify="right")
    for entry in report.most_frequent:
        table.add_row(entry.phrase, f"{entry.before:,}", f"{entry.after:,}")
    console.print(table)
    console.print("kept captions contain other noun phrases too, so a phrase may be kept more often than its cap")
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items()) or "none"
    console.print(
        f"{report.phrases:,} noun phrases: {report.rare_phrases:,} in fewer than {args.minimum} captions, "
        f"{report.capped_phrases:,} in more than {args.maximum}"
    )
    console.print(f"{args.output}: {report.kept:,} of {report.rows:,} rows; left out: {left_out}", soft_wrap=True)
    return 0
