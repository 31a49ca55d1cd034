"""`lora-llava preview`: show samples from the batches that training would use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.data.collator import PackedCollator, PaddedCollator
from lora_llava.data.conversation import IMAGE_PLACEHOLDER
from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.data.images.image_files import image_file
from lora_llava.data.images.image_sources import BadImageError
from lora_llava.data.templates.spans import AnyTemplate
from lora_llava.model.families.tower_families import image_tokens
from lora_llava.model.start import plan_model
from lora_llava.pages.preview_page import render_page
from lora_llava.pages.preview_samples import Preview, PreviewRow, PreviewSample, PreviewToken
from lora_llava.pages.preview_terminal import print_samples
from lora_llava.planning.row_order import validation_rows
from lora_llava.planning.run_plan import build_run_processor, is_padding_free, order_run
from lora_llava.recipe import Recipe
from lora_llava.splits.earlier_rows import earlier_rows
from lora_llava.splits.encoded_sources import encode_splits, show_progress
from lora_llava.splits.split_rows import Split, build_split


@dataclass(frozen=True)
class _Batches:
    """The settings for building and reading batches.

    Attributes:
        split: The split with the rows.
        tokenizer: The tokenizer, for the texts of tokens.
        processor: The processor, for its image normalisation.
        image_id: Token id of `<image>`.
        num_image_tokens: Tokens per image.
        padding_free: Whether rows are packed.
        capacity: Most tokens of a row; 0 without a limit.
    """

    split: Split
    tokenizer: Any
    processor: Any
    image_id: int
    num_image_tokens: int
    padding_free: bool
    capacity: int


def preview(
    recipe: Recipe, *, name: str, split: str = "train", samples: int = 50, output: Path | None, console: Console
) -> Preview:
    """Show the first samples of a run.

    Args:
        recipe: The recipe.
        name: The recipe's name, for the title of the page.
        split: `train`, in the order of the run, or another split, in the order of its file.
        samples: Most samples to show.
        output: The HTML file; None prints to the terminal instead.
        console: Prints the result.

    Returns:
        The samples shown.

    Raises:
        UserError: If data or model is missing, or a row cannot be used.
    """
    if output is not None and output.exists() and not _is_page(output):
        raise UserError(f"--output: {output} exists and is not a preview; choose another file")
    model = plan_model(recipe.model)
    tokenizer, processor, template = build_run_processor(recipe, model)
    seen = earlier_rows(recipe, processor, template, model.config, show_progress)
    splits = encode_splits(recipe, tokenizer, template, show_progress, seen=seen)
    if split not in splits:
        raise UserError(f"--split {split}: the recipe has no such rows; choose from {', '.join(splits)}")
    # Open images only when shown, unless bad ones are dropped, which changes the order of the run.
    trusted = recipe.data.on_bad_image == "error"
    found = build_split(recipe, split, splits[split], processor, model.config, show_progress, trusted=trusted)
    rows = order_run(recipe, found, model.config).rows if split == "train" else _in_order(recipe, found)
    batches = _Batches(
        found,
        tokenizer,
        processor,
        tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),  # type: ignore[arg-type]
        image_tokens(model.config),
        is_padding_free(recipe, model.config)[0],
        recipe.training.max_tokens_per_row or 0,
    )
    shown = Preview(
        "Samples as they are trained", _facts(recipe, name, found, template), *_take(batches, rows, samples)
    )
    if output is None:
        print_samples(shown, console)
        return shown
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render_page(shown, output.parent), encoding="utf-8")
    message = f"{output}: {len(shown.samples)} samples in {len(shown.rows)} rows; open it in a browser"
    console.print(message, soft_wrap=True)
    return shown


def _is_page(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(15).lower() == b"<!doctype html>"
    except OSError:
        return False


def _in_order(recipe: Recipe, split: Split) -> list[list[int]]:
    return validation_rows(recipe.training, split.rows.lengths.tolist())


def _facts(recipe: Recipe, name: str, split: Split, template: AnyTemplate) -> tuple[tuple[str, str], ...]:
    start = recipe.model.start_from
    budget = recipe.training.max_tokens_per_row
    return (
        ("recipe", name),
        ("stage", str(recipe.stage)),
        ("template", template.title),
        ("model", start.llava or f"{recipe.model.llm} + {recipe.model.vision_tower}"),
        ("rows", f"{len(split.rows):,} used of {split.report.rows:,}"),
        ("batches", f"packed to {budget:,} tokens" if budget else f"{recipe.training.batch_size} samples"),
        ("seed", str(recipe.seed)),
    )


def _take(
    batches: _Batches, rows: Sequence[Sequence[int]], count: int
) -> tuple[tuple[PreviewSample, ...], tuple[PreviewRow, ...]]:
    """Collate batches until there are enough samples, and read the samples back."""
    samples: list[PreviewSample] = []
    passes: list[PreviewRow] = []
    for row in progress_bar(rows, desc="collating", unit="row", leave=False):
        if len(samples) >= count:
            break
        parts = list(_read_batch(batches, row))
        places = []
        for index, part in zip(row, parts, strict=True):
            shown = len(samples) < count
            places.append(len(samples) if shown else -1)
            if shown:
                samples.append(_sample(batches, index, *part, row=len(passes)))
        lengths = tuple(len(ids) for ids, _, _ in parts)
        padding = 0 if batches.padding_free else len(lengths) * max(lengths) - sum(lengths)
        passes.append(PreviewRow(tuple(places), lengths, batches.capacity, padding))
    return tuple(samples), tuple(passes)


Part = tuple[list[int], list[int], list[torch.Tensor]]
"""Input ids, labels and images of a sample, read back from a batch."""


def _read_batch(batches: _Batches, row: Sequence[int]) -> Iterator[Part]:
    """Build one batch as training does, and split it into its samples."""
    split = batches.split
    if batches.padding_free:
        collator: Any = PackedCollator(split.load_pixels)
    else:
        collator = PaddedCollator(split.load_pixels, batches.tokenizer.pad_token_id)
    try:
        batch = collator([split.rows[i] for i in row])
    except BadImageError as error:
        raise UserError(f"{error}; `lora-llava check` lists all such rows") from None
    if batches.padding_free:
        ends = batch["cu_seq_lens_q"].tolist()
        cuts: list[Any] = [(0, slice(start, end)) for start, end in pairwise(ends)]
    else:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        cuts = [(place, slice(0, length)) for place, length in enumerate(lengths)]
    used = 0
    for cut in cuts:
        ids, labels = batch["input_ids"][cut].tolist(), batch["labels"][cut].tolist()
        images = ids.count(batches.image_id) // batches.num_image_tokens
        yield ids, labels, list(batch["pixel_values"][used : used + images]) if images else []
        used += images


def _sample(
    batches: _Batches, index: int, ids: list[int], labels: list[int], pixels: list[torch.Tensor], *, row: int
) -> PreviewSample:
    rows = batches.split.rows
    table, number = rows.table_row(index)
    notes = [note for note in table.notes[number].split("\0") if note]
    if table.lengths(batches.num_image_tokens)[number] > rows.max_length:
        notes.append("answer cut to fit")
    return PreviewSample(
        batches.split.source_of(index).name,
        table.row_ids[number],
        tuple(_tokens(batches, ids, labels)),
        tuple(_image(one, batches.processor.image_processor) for one in pixels),
        row,
        tuple(notes),
        table.row_name(number),
        tuple(batches.split.images.label(name) for name in rows.image_files(index)) if pixels else (),
        tuple(image_file(batches.split.images, name) for name in rows.image_files(index)) if pixels else (),
    )


def _tokens(batches: _Batches, ids: list[int], labels: list[int]) -> Iterator[PreviewToken]:
    """Yield the tokens of a sample; all positions of an image are one token."""
    names = batches.tokenizer.convert_ids_to_tokens(ids)
    position = 0
    while position < len(ids):
        token, is_image = ids[position], ids[position] == batches.image_id
        count = batches.num_image_tokens if is_image else 1
        trained = labels[position] != IGNORE_INDEX
        yield PreviewToken(token, names[position], trained, position, count, is_image)
        position += count


def _image(pixels: torch.Tensor, image_processor: Any) -> Image.Image:
    """Undo the normalisation, to show the image as the tower receives it."""
    both = ([0.0] * 3, [1.0] * 3)
    if image_processor.do_normalize:
        both = (image_processor.image_mean, image_processor.image_std)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in both)
    values = ((pixels.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())
