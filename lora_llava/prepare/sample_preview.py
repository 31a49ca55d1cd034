"""`lora-llava preview`: show samples from the batches that training would use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.console import Console

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.data.collator import PackedCollator, PaddedCollator
from lora_llava.data.conversation import IMAGE_PLACEHOLDER
from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.data.encoded import EncodedRows
from lora_llava.data.images.image_files import image_file
from lora_llava.data.images.image_sources import BadImageError
from lora_llava.data.images.tiling import TiledImages
from lora_llava.data.packed_rows.shared_prefixes import Segment, SharedPrefixes, SharedSamples, segments_of
from lora_llava.data.templates.spans import AnyTemplate
from lora_llava.model.start import plan_model
from lora_llava.pages.preview_page import render_page
from lora_llava.pages.preview_samples import Preview, PreviewRow, PreviewSample, PreviewToken
from lora_llava.pages.preview_terminal import print_samples
from lora_llava.planning.row_order import validation_rows
from lora_llava.planning.run_plan import build_run_processor, is_padding_free, order_run, prefixes_of
from lora_llava.recipe import Recipe
from lora_llava.splits.earlier_rows import earlier_rows
from lora_llava.splits.encoded_sources import encode_splits, show_progress
from lora_llava.splits.split_rows import Split, build_split

_BETWEEN_TILES = (255, 255, 255)


@dataclass(frozen=True)
class _Batches:
    """The settings for building and reading batches.

    Attributes:
        split: The split with the rows.
        tokenizer: The tokenizer, for the texts of tokens.
        processor: The processor, for its image normalisation.
        image_id: Token id of `<image>`.
        padding_free: Whether rows are packed.
        capacity: Most tokens of a row; 0 without a limit.
        shared: The prefixes that samples share; None if none may be shared.
    """

    split: Split
    tokenizer: Any
    processor: Any
    image_id: int
    padding_free: bool
    capacity: int
    shared: SharedPrefixes | None


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
    padding_free = is_padding_free(recipe, model.config)[0]
    sharing = padding_free and recipe.training.share_images != "off"
    # Open images only when shown, unless the order of the run depends on them: bad ones are dropped, equal ones shared.
    trusted = recipe.data.on_bad_image == "error" and not sharing
    found = build_split(recipe, split, splits[split], processor, model.config, show_progress, trusted=trusted)
    shared = prefixes_of(recipe, found) if sharing else None
    order = order_run(recipe, found, model.config, shared).rows
    rows = order if split == "train" else validation_rows(recipe.training, found.rows.lengths.tolist(), shared=shared)
    batches = _Batches(
        found,
        tokenizer,
        processor,
        tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),  # type: ignore[arg-type]
        padding_free,
        recipe.training.max_tokens_per_row or 0,
        shared,
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
                samples.append(_sample(batches, index, part, row=len(passes)))
        lengths = tuple(len(part.ids) - part.shared for part in parts)
        prefixes = tuple(part.shared if part.begins else 0 for part in parts)
        padding = 0 if batches.padding_free else len(lengths) * max(lengths) - sum(lengths)
        passes.append(PreviewRow(tuple(places), lengths, batches.capacity, padding, prefixes))
    return tuple(samples), tuple(passes)


class _Part(NamedTuple):
    """A sample, read back from a batch.

    Attributes:
        ids: Its input ids.
        labels: Its labels.
        images: The tiles of its images, one image after another; one tile each for a model without tiles.
        shared: Tokens of the prefix that it shares in its row; 0 if none.
        begins: Whether it is the first sample of its row with that prefix.
    """

    ids: list[int]
    labels: list[int]
    images: list[torch.Tensor]
    shared: int = 0
    begins: bool = False


def _read_batch(batches: _Batches, row: Sequence[int]) -> Iterator[_Part]:
    """Build one batch as training does, and split it into its samples."""
    split = batches.split
    rows = split.rows if batches.shared is None else SharedSamples(split.rows, batches.shared)
    samples = [rows[i] for i in row]
    tiles = [_tile_counts(split.rows, i) for i in row]
    if batches.padding_free:
        collator: Any = PackedCollator(split.load_pixels)
    else:
        collator = PaddedCollator(split.load_pixels, batches.tokenizer.pad_token_id)
    try:
        batch = collator(samples)
    except BadImageError as error:
        raise UserError(f"{error}; `lora-llava check` lists all such rows") from None
    if batches.padding_free:
        ends = batch["cu_seq_lens_q"].tolist()
        segments = segments_of(samples)
        images = [sum(tiles[each.sample][each.first_image : each.last_image]) for each in segments]
        yield from _join(segments, list(_cut(batch, [(0, slice(*each)) for each in pairwise(ends)], images)))
    else:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        cuts = [(place, slice(0, length)) for place, length in enumerate(lengths)]
        yield from _cut(batch, cuts, list(map(sum, tiles)))


def _tile_counts(rows: EncodedRows, index: int) -> list[int]:
    """Return the tiles of each image of a row."""
    table, row = rows.table_row(index)
    return table.tile_counts(row)


def _cut(batch: dict[str, Any], cuts: Sequence[Any], images: Sequence[int]) -> Iterator[_Part]:
    """Cut a batch into parts, with the number of tiles of each."""
    used = 0
    for cut, count in zip(cuts, images, strict=True):
        ids, labels = batch["input_ids"][cut].tolist(), batch["labels"][cut].tolist()
        yield _Part(ids, labels, list(batch["pixel_values"][used : used + count]) if count else [])
        used += count


def _join(segments: Sequence[Segment], parts: Sequence[_Part]) -> Iterator[_Part]:
    """Join each branch with its prefix."""
    prefixes = {segment.prefix for segment in segments}
    for number, (segment, part) in enumerate(zip(segments, parts, strict=True)):
        if number in prefixes:
            continue
        if segment.prefix is None:
            yield part
            continue
        before = parts[segment.prefix]
        yield _Part(
            before.ids + part.ids,
            before.labels + part.labels,
            before.images + part.images,
            len(before.ids),
            number == segment.prefix + 1,
        )


def _sample(batches: _Batches, index: int, part: _Part, *, row: int) -> PreviewSample:
    ids, labels, pixels = part.ids, part.labels, part.images
    rows = batches.split.rows
    table, number = rows.table_row(index)
    notes = [note for note in table.notes[number].split("\0") if note]
    if table.lengths()[number] > rows.max_length:
        notes.append("answer cut to fit")
    shown = [_image(one, batches.processor.image_processor) for one in pixels]
    names = rows.image_files(index)
    captions: list[str] = []
    if table.tiled is not None:
        shown, captions = _with_tiles(shown, table.images(number), table.tiled)
    return PreviewSample(
        batches.split.source_of(index).name,
        table.row_ids[number],
        tuple(_tokens(batches, ids, labels, table.image_tokens(number).tolist())),
        tuple(shown),
        row,
        tuple(notes),
        table.row_name(number),
        tuple(batches.split.images.label(name) for name in names) if pixels else (),
        tuple(image_file(batches.split.images, name) for name in names) if pixels else (),
        tuple(captions),
    )


def _with_tiles(
    tiles: Sequence[Image.Image], names: Sequence[str], tiled: TiledImages
) -> tuple[list[Image.Image], list[str]]:
    """Return each image as a whole with its tiles beside it, and its caption."""
    found, captions, used, side = [], [], 0, tiled.tiling.tile
    for name, count in zip(names, tiled.tiles(names), strict=True):
        height, width = tiled.tiling.canvas(tiled.size(name))
        rows, columns = height // side, width // side
        found.append(_beside(tiles[used], tiles[used + 1 : used + count], columns))
        seen = f"the whole image and {rows} × {columns} tiles, {side} × {side} each"
        tokens, patches = tiled.tokens([name])[0], tiled.tiling.patches
        padded = tokens < patches**2 + rows * patches * (columns * patches + 1)
        captions.append(f"{seen}: {tokens:,} tokens" + (", none for padding" if padded else ""))
        used += count
    return found, captions


def _beside(whole: Image.Image, tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Draw an image, and beside it its tiles as a grid."""
    side, gap = whole.width, max(1, whole.width // 40)
    rows = len(tiles) // columns
    size = side * (1 + columns) + gap * (columns + 3), side * rows + gap * (rows - 1)
    drawn = Image.new("RGB", size, _BETWEEN_TILES)
    drawn.paste(whole, (0, 0))
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        drawn.paste(tile, (side + 4 * gap + column * (side + gap), row * (side + gap)))
    return drawn


def _tokens(
    batches: _Batches, ids: list[int], labels: list[int], image_tokens: Sequence[int]
) -> Iterator[PreviewToken]:
    """Yield the tokens of a sample; all positions of an image are one token."""
    names = batches.tokenizer.convert_ids_to_tokens(ids)
    position, of_images = 0, iter(image_tokens)
    while position < len(ids):
        token, is_image = ids[position], ids[position] == batches.image_id
        count = next(of_images) if is_image else 1
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
