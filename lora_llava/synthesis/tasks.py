"""Plan of a data set: which flavours to generate from which image, by weight and seed."""

from __future__ import annotations

from array import array
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from hashlib import blake2b, sha256
from itertools import accumulate
from math import isfinite
from typing import Any

from lora_llava.core.errors import UserError, nearest
from lora_llava.synthesis.contexts.context import Context
from lora_llava.synthesis.sample import FLAVOURS, WEIGHTS, Flavour, Task

_GOLDEN = 0.6180339887498949
"""Multiples of the golden ratio spread evenly over a circle, however many there are. Stepping by it spreads the
flavours of one image's samples in proportion to the weights, and rarely repeats a flavour several times in a row."""


class Tasks(Sequence[Task]):
    """Tasks sorted by image, flavour and number, stored in eight bytes each.

    Args:
        codes: Each task as `(place * number of flavours + flavour) * most + number`, sorted.
        most: A bound that every task's number stays below.
        stems: `image_stem` of each context's image.
        left_out: For each requested flavour, the number of images whose context is too thin for it.
    """

    def __init__(self, codes: array[int], most: int, stems: list[str], left_out: Mapping[Flavour, int]) -> None:
        self._codes, self._most, self._stems = codes, most, stems
        self.left_out = dict(left_out)

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, index: Any) -> Any:
        """Return one task, or a list of tasks for a slice."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        rest, number = divmod(self._codes[index], self._most)
        place, kind = divmod(rest, len(FLAVOURS))
        flavour = FLAVOURS[kind]
        return Task(f"{self._stems[place]}-{flavour}-{number}", place, flavour, number)

    def counts(self) -> dict[Flavour, int]:
        """Count the tasks of each flavour."""
        found = [0] * len(FLAVOURS)
        for code in self._codes:
            found[code // self._most % len(FLAVOURS)] += 1
        return dict(zip(FLAVOURS, found, strict=True))


def image_stem(image: str) -> str:
    """Return the part of a task id that names the image.

    It depends on this image's name alone, so that an id means the same image whatever other images a set has.

    Args:
        image: The image's name.

    Returns:
        `000000296284` for `000000296284.jpg`. For an image in a folder or with another suffix: the stem and eight hex
        digits of the full name's hash, since `a/1.jpg`, `b/1.jpg`, `1.jpg` and `1.png` share a stem.
    """
    own = image.rpartition("/")[2]
    stem, dot, suffix = own.rpartition(".")
    if dot and stem and suffix == "jpg" and own == image:
        return stem
    return f"{stem or own}-{sha256(image.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def can_carry(context: Context, flavour: Flavour) -> bool:
    """Check whether a context contains enough for a flavour.

    LLaVA's teacher saw five captions and the boxes of each image (arXiv 2304.08485, section 3), so the paper sets no
    minimum. One caption states who does what and where, which is enough for every flavour. One box states what is
    there and where, which is enough for a conversation or for reasoning. A detailed description relates objects to
    each other; from a single box everything but the label would be invented, so it needs two boxes.

    Args:
        context: The image's captions and boxes.
        flavour: Kind of sample.

    Returns:
        Whether the teacher can be prompted for this flavour.
    """
    if context.captions:
        return True
    return len(context.boxes) >= (2 if flavour == "detail" else 1)


def plan_tasks(
    contexts: Sequence[Context],
    *,
    weights: Mapping[Flavour, float] = WEIGHTS,
    samples: int | None = None,
    samples_per_image: int = 1,
    seed: int,
    where: str = "",
) -> Tasks:
    """Plan which samples to generate from which image.

    With `samples`, that many tasks are distributed to the flavours by weight (largest remainder method; ties go to the
    first flavour). The images of a flavour are drawn by seed, and no image is drawn twice before every image was drawn
    once. A larger `samples` keeps the images of a smaller one, except where rounding takes one task from a flavour.

    Without `samples`, every image gets `samples_per_image` tasks. Their flavours depend on the image's name and the
    seed alone, so that adding images or samples leaves existing tasks as they are. Over all images the flavours follow
    the weights, and within one image they are spread out. An image whose context is too thin for a flavour gets
    another flavour.

    Args:
        contexts: Captions and boxes of the images.
        weights: Weight of each flavour; a flavour that is missing or 0 is not generated.
        samples: Number of tasks; None generates `samples_per_image` from every image.
        samples_per_image: Tasks of each image; with `samples`, the maximum for each image and flavour.
        seed: Seed of the draw.
        where: Prefix of the arguments' names in messages.

    Returns:
        The tasks, sorted by image.

    Raises:
        UserError: If a weight is invalid or all are 0, a number is below 1, or the images do not suffice for `samples`.
    """
    prefix = f"{where}." if where else ""
    shares = _shares(weights, f"{prefix}weights")
    for name, value in (("samples", samples), ("samples_per_image", samples_per_image)):
        if value is not None and value < 1:
            raise UserError(f"{prefix}{name}: it is {value}; set it to 1 or more")
    images: list[str] = []
    carried: list[tuple[Flavour, ...]] = []
    # Images share a few tuple objects, which saves memory when there are a hundred thousand images.
    known: dict[tuple[Flavour, ...], tuple[Flavour, ...]] = {}
    for context in contexts:
        images.append(context.image)
        flavours = tuple(flavour for flavour in shares if can_carry(context, flavour))
        carried.append(known.setdefault(flavours, flavours))
    if samples is None:
        tasks = _distribute_to_images(images, carried, shares, samples_per_image, seed)
    else:
        places = {flavour: [i for i, flavours in enumerate(carried) if flavour in flavours] for flavour in shares}
        _check_samples(samples, samples_per_image, shares, {f: len(mine) for f, mine in places.items()}, prefix)
        tasks = _distribute_to_flavours(images, places, distribute(samples, shares), seed)
    kinds = {flavour: kind for kind, flavour in enumerate(FLAVOURS)}
    codes = ((place * len(kinds) + kinds[flavour]) * samples_per_image + number for place, flavour, number in tasks)
    left_out = {flavour: sum(flavour not in flavours for flavours in carried) for flavour in shares}
    return Tasks(array("Q", sorted(codes)), samples_per_image, [image_stem(image) for image in images], left_out)


def distribute(count: int, shares: Mapping[Flavour, Fraction]) -> dict[Flavour, int]:
    """Split a number into integers by share, by the largest remainder method.

    Args:
        count: Number to split.
        shares: Share of each flavour; they sum to 1.

    Returns:
        For each flavour, `count * share` rounded down or up; they sum to `count`.
    """
    counts = {flavour: int(count * share) for flavour, share in shares.items()}
    by_remainder = sorted(shares, key=lambda flavour: counts[flavour] - count * shares[flavour])
    for flavour in by_remainder[: count - sum(counts.values())]:
        counts[flavour] += 1
    return counts


def _shares(weights: Mapping[Flavour, float], field: str) -> dict[Flavour, Fraction]:
    """Return the share of each flavour whose weight is above 0, in the order of `FLAVOURS`."""
    for name, weight in weights.items():
        if name not in FLAVOURS:
            raise UserError(
                f"{field}: {name!r} is not a flavour{nearest(name, FLAVOURS)}; choose from {', '.join(FLAVOURS)}"
            )
        if not isfinite(weight) or weight < 0:
            raise UserError(f"{field}: the weight of {name} is {weight}; set it to 0 or more")
    given = {flavour: Fraction(weights[flavour]) for flavour in FLAVOURS if weights.get(flavour)}
    if not given:
        raise UserError(f"{field}: every weight is 0; set at least one of {', '.join(FLAVOURS)} above 0")
    total = sum(given.values())
    return {flavour: weight / total for flavour, weight in given.items()}


def _check_samples(
    samples: int, most: int, shares: Mapping[Flavour, Fraction], carriers: Mapping[Flavour, int], prefix: str
) -> None:
    """Check that every flavour has enough images; otherwise raise with the number of samples that are possible."""

    def short(count: int) -> Flavour | None:
        return next((f for f, wanted in distribute(count, shares).items() if wanted > carriers[f] * most), None)

    lacking = short(samples)
    if lacking is None:
        return
    # Start from an upper bound: rounding may add one task to a flavour's share.
    possible = min(samples, *(int((carriers[flavour] * most + 1) / share) for flavour, share in shares.items()))
    while short(possible):
        possible -= 1
    raise UserError(
        f"{prefix}samples: {samples:,} samples include {distribute(samples, shares)[lacking]:,} of {lacking}, but only "
        f"{carriers[lacking]:,} images suit it and {prefix}samples_per_image is {most}; at most {possible:,} "
        "samples are possible with these weights: lower samples, or raise samples_per_image"
    )


def _distribute_to_flavours(
    images: Sequence[str], places: Mapping[Flavour, Sequence[int]], wanted: Mapping[Flavour, int], seed: int
) -> Iterator[tuple[int, Flavour, int]]:
    """Draw the images of each flavour; yields (place of the image, flavour, number)."""
    for flavour, count in wanted.items():
        for number in range(-(-count // max(len(places[flavour]), 1))):
            left = count - number * len(places[flavour])
            order = places[flavour]
            if left < len(order):
                order = sorted(order, key=lambda place: _draw(f"{seed} {flavour} {number} {images[place]}"))[:left]
            yield from ((place, flavour, number) for place in order)


def _distribute_to_images(
    images: Sequence[str],
    carried: Sequence[tuple[Flavour, ...]],
    shares: Mapping[Flavour, Fraction],
    most: int,
    seed: int,
) -> Iterator[tuple[int, Flavour, int]]:
    """Draw the flavours of each image; yields (place of the image, flavour, number)."""
    bounds = {flavours: list(accumulate(float(shares[flavour]) for flavour in flavours)) for flavours in set(carried)}
    for place, flavours in enumerate(carried):
        if not flavours:
            continue
        numbers = dict.fromkeys(flavours, 0)
        start = _draw(f"{seed} {images[place]}") * 2.0**-64
        for step in range(most):
            point = (start + step * _GOLDEN) % 1 * bounds[flavours][-1]
            flavour = flavours[min(bisect(bounds[flavours], point), len(flavours) - 1)]
            yield place, flavour, numbers[flavour]
            numbers[flavour] += 1


def _draw(text: str) -> int:
    """Return a pseudo-random number below 2 ** 64 that, unlike `hash`, is the same in every process."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
