"""`lora-llava filter-captions`: choose captions that cover the noun phrases of a large set."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path, positive

SUMMARY = "choose captions that cover the noun phrases of a large set, as LLaVA chose 595K of CC3M"
EXAMPLES = (
    "lora-llava filter-captions captions.json --output chosen.json",
    "lora-llava filter-captions captions.parquet --output chosen.jsonl --tagger light",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "captions", type=a_path, help="JSON, JSONL, CSV, TSV or Parquet of captions, or LLaVA's chat.json"
    )
    parser.add_argument("--output", type=a_path, required=True, help="the chosen rows, .json or .jsonl")
    parser.add_argument("--caption-column", default="caption", help="name of the caption column")
    parser.add_argument("--minimum", type=positive, default=3, help="noun phrases in fewer captions are skipped")
    parser.add_argument("--maximum", type=positive, default=100, help="captions kept for a frequent noun phrase")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawing")
    parser.add_argument("--tagger", choices=["auto", "spacy", "light"], default="auto", help="what finds noun phrases")


def run(args: argparse.Namespace, console: Any) -> int:
    from rich.table import Table
    from tqdm import tqdm

    from lora_llava.data.concepts.concept_files import filter_caption_file
    from lora_llava.data.concepts.noun_phrases import load_noun_phrases

    noun_phrases = load_noun_phrases(args.tagger)
    console.print(f"noun phrases by the {noun_phrases.name} tagger")
    report = filter_caption_file(
        args.captions,
        args.output,
        noun_phrases=noun_phrases,
        column=args.caption_column,
        minimum=args.minimum,
        maximum=args.maximum,
        seed=args.seed,
        progress=lambda rows: tqdm(rows, unit="caption", dynamic_ncols=True),
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
        f"{report.phrases:,} noun phrases, {report.rare_phrases:,} of fewer than {args.minimum} captions, "
        f"{report.capped_phrases:,} of more than {args.maximum}"
    )
    console.print(f"{args.output}: {report.kept:,} of {report.rows:,} rows; left out: {left_out}", soft_wrap=True)
    return 0
