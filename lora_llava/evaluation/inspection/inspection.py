"""`lora-llava inspect`: measure every row of a run, and list those that deserve a look."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.core.storage import file_hash
from lora_llava.data.images.image_id import ImageName, saved_name
from lora_llava.evaluation.answerers import messages_of
from lora_llava.evaluation.evaluate import load_evaluator
from lora_llava.evaluation.inspection.inspected_rows import InspectedRow, OpenedInspection, by_image, open_inspection
from lora_llava.evaluation.inspection.kept_measures import KeptMeasures
from lora_llava.evaluation.inspection.near_duplicates import find_near_duplicates
from lora_llava.evaluation.inspection.row_measures import GAIN_MARGIN, ROWS, Measures, measure_rows
from lora_llava.evaluation.inspection.surprise import Surprise, find_surprises
from lora_llava.inference.batches import Batches
from lora_llava.model.families.image_counts import tokens_of
from lora_llava.model.provenance import weights_state
from lora_llava.model.weights.names import ADAPTER_FILE
from lora_llava.recipe import EvaluationSection

_PART = 256
"""Rows that are measured together: 300 MB of CLIP ViT-L/14-336's features, if each has its own image."""

SplitImage = tuple[str, ImageName]
"""A split, and one of its images."""


@dataclass(frozen=True)
class RowFinding:
    """The figures of one row; a figure that it does not have is None.

    Attributes:
        split: Its split.
        place: The index of its row among the rows read.
        loss: Nats per answer token with its images.
        tokens: Answer tokens, with the stop.
        shuffled: Nats per answer token with images of other rows, the mean over `shuffles`.
        shuffles: Shuffled images in that mean.
        blank: Nats per answer token without an image.
        surprise: How surprising its answer is.
        surprise_rank: Place among all rows by that, from 1; 0 without a surprise.
        problem: Why it has no figures; "" if it has.
    """

    split: str
    place: int
    loss: float | None
    tokens: int
    shuffled: float | None
    shuffles: int
    blank: float | None
    surprise: Surprise | None
    surprise_rank: int
    problem: str

    @property
    def gain(self) -> float | None:
        """Nats per answer token that the row's image saves, compared with other images."""
        return None if self.loss is None or self.shuffled is None else self.shuffled - self.loss

    @property
    def gains_nothing(self) -> bool:
        """Whether its image saves less than `GAIN_MARGIN`."""
        return self.gain is not None and self.gain <= GAIN_MARGIN

    @property
    def is_surprising(self) -> bool:
        return self.surprise is not None and self.surprise.is_surprising


@dataclass(frozen=True)
class ImageGroup:
    """Near-duplicate images.

    Attributes:
        images: Two or more images.
        nearest: Of each, the nearest other one.
        cosines: Of each, the cosine of its features and those of the nearest other one.
    """

    images: Sequence[SplitImage]
    nearest: Sequence[SplitImage]
    cosines: Sequence[float]

    @property
    def is_leak(self) -> bool:
        """Whether its images are in different splits."""
        return len({split for split, _ in self.images}) > 1


@dataclass(frozen=True)
class Inspection:
    """What an inspection found.

    Attributes:
        opened: The run and its data.
        rows: The rows, in their order.
        findings: The figures of each row.
        groups: Near-duplicate images, the nearest first.
        images: Number of different images that were compared.
    """

    opened: OpenedInspection
    rows: Sequence[InspectedRow]
    findings: Sequence[RowFinding]
    groups: Sequence[ImageGroup]
    images: int

    def label(self, image: SplitImage) -> str:
        """Return an image's file name."""
        return self.opened.splits[image[0]].images.label(image[1])  # type: ignore[arg-type]

    def no_gain(self) -> list[RowFinding]:
        """Return the rows that gain nothing from their image, the smallest gain first."""
        return sorted((each for each in self.findings if each.gains_nothing), key=lambda each: each.gain or 0.0)

    def surprising(self) -> list[RowFinding]:
        """Return the rows with a surprising answer, the most surprising first."""
        return sorted((each for each in self.findings if each.is_surprising), key=lambda each: each.surprise_rank)

    def suspect_images(self) -> set[SplitImage]:
        """Return the images with several rows, all surprising: the image is likelier wrong than each answer."""
        rows: dict[SplitImage, list[bool]] = {}
        for each in self.findings:
            for name in self.rows[each.place].row.images:
                rows.setdefault((each.split, name), []).append(each.is_surprising)
        return {image for image, surprising in rows.items() if len(surprising) > 1 and all(surprising)}

    def problems(self) -> list[RowFinding]:
        return [each for each in self.findings if each.problem]


def inspect_rows(
    run: str,
    *,
    data: str | None = None,
    image_folder: str | None = None,
    folder: Path | None = None,
    limit: int | None = None,
) -> tuple[Inspection, KeptMeasures]:
    """Measure rows with a run's model, and find those that deserve a look.

    Args:
        run: A run directory.
        data: A file of rows in any form that training reads; None inspects the run's training and held-out rows.
        image_folder: Root folder of the images of `data`.
        folder: Folder that keeps finished parts until the results are written; default: the run directory.
        limit: Most rows, drawn by the recipe's seed.

    Returns:
        What was found, and the finished parts, to be removed once it is written.

    Raises:
        UserError: If the run, its base or the data is missing or does not fit, or no row can be measured.
    """
    opened = open_inspection(run, data, image_folder)
    rows = opened.read(limit)
    kept = KeptMeasures(folder or opened.folder, _key(opened, rows))
    parts = by_image(rows, _PART, opened.recipe.seed)
    measured = _measure_parts(opened, rows, parts, kept)
    findings, images = _findings(rows, parts, measured)
    if all(each.problem for each in findings):
        raise UserError(f"none of {len(rows):,} rows can be measured: {rows[0].row.name}: {findings[0].problem}")
    names = list(images)
    groups = [
        ImageGroup([names[place] for place in group.places], [names[place] for place in group.nearest], group.cosines)
        for group in find_near_duplicates([images[name] for name in names])
    ]
    return Inspection(opened, rows, findings, groups, len(names)), kept


def _key(opened: OpenedInspection, rows: Sequence[InspectedRow]) -> list[object]:
    """Return all that the measures depend on."""
    section = opened.recipe.model
    base = Path(opened.base)
    return [
        file_hash(opened.folder / ADAPTER_FILE),
        weights_state(base) if base.is_dir() else opened.base,
        [section.quantization, section.dtype, opened.recipe.seed, repr(opened.template), _PART],
        {name: split.fingerprint() for name, split in opened.splits.items()},
        [[each.split, messages_of(each.row), [*map(saved_name, each.row.images)]] for each in rows],
    ]


def _names(rows: Sequence[InspectedRow], part: Sequence[int]) -> list[ImageName]:
    return list(dict.fromkeys(name for i in part for name in rows[i].row.images))


def _measure_parts(
    opened: OpenedInspection, rows: Sequence[InspectedRow], parts: Sequence[Sequence[int]], kept: KeptMeasures
) -> list[Measures]:
    found = [kept.load(number, _names(rows, part)) for number, part in enumerate(parts)]
    done = sum(len(part) for part, each in zip(parts, found, strict=True) if each is not None)
    if done:
        tqdm.write(f"{done:,} of {len(rows):,} rows are in {kept.folder} already and are kept", file=sys.stderr)
    settings = opened.recipe.evaluation or EvaluationSection()
    evaluator = load_evaluator(opened.evaluation(), settings.batch_size) if done < len(rows) else None
    batches = Batches(evaluator.batch_size, *ROWS) if evaluator is not None else None
    bar = progress_bar(desc="inspecting", total=len(rows), initial=done, unit="row")
    try:
        with bar:
            for number, part in enumerate(parts):
                if found[number] is None and evaluator is not None:
                    split = opened.splits[rows[part[0]].split]
                    tokens = tokens_of(opened.plan.config, split.sizes)
                    here = replace(evaluator, load_pixels=split.load_pixels, num_image_tokens=tokens)
                    chosen = [rows[i].row for i in part]
                    found[number] = measure_rows(here, chosen, opened.recipe.seed + number, batches)
                    kept.save(number, _names(rows, part), found[number])  # type: ignore[arg-type]
                    done += len(part)
                    bar.update(len(part))
    except KeyboardInterrupt:
        tqdm.write(
            f"{done:,} of {len(rows):,} rows are in {kept.folder}; run the same command to resume", file=sys.stderr
        )
        raise
    return [each for each in found if each is not None]


def _findings(
    rows: Sequence[InspectedRow], parts: Sequence[Sequence[int]], measured: Sequence[Measures]
) -> tuple[list[RowFinding], dict[SplitImage, np.ndarray]]:
    """Put the measures of all parts together, in the order of the rows."""
    order = np.array([i for part in parts for i in part])
    back = np.argsort(order)
    columns = {
        name: np.concatenate([getattr(each, name) for each in measured])[back]
        for name in ("own", "tokens", "surprise", "shuffled", "shuffles", "blank")
    }
    width = max(each.states.shape[1] for each in measured)
    sized = [each.states if each.states.shape[1] else np.full((len(each.own), width), np.nan) for each in measured]
    surprises = find_surprises([each.row for each in rows], np.concatenate(sized)[back], columns["surprise"])
    problems = {parts[n][i]: text for n, each in enumerate(measured) for i, text in each.problems.items()}
    images = {
        (rows[part[0]].split, name): each.images[name]
        for part, each in zip(parts, measured, strict=True)
        for name in _names(rows, part)  # in the same order whether measured or kept
        if name in each.images
    }
    scored = [i for i, each in enumerate(surprises) if each is not None]
    scored.sort(key=lambda i: -surprises[i].score)  # type: ignore[union-attr]
    ranks = {i: rank for rank, i in enumerate(scored, 1)}

    def value(name: str, i: int) -> float | None:
        return float(columns[name][i]) if np.isfinite(columns[name][i]) else None

    findings = [
        RowFinding(
            each.split,
            i,
            value("own", i),
            int(value("tokens", i) or 0),
            value("shuffled", i),
            int(value("shuffles", i) or 0),
            value("blank", i),
            surprises[i],
            ranks.get(i, 0),
            problems.get(i, ""),
        )
        for i, each in enumerate(rows)
    ]
    return findings, images
