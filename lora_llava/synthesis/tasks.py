"""What is to be made of which image: flavours dealt by weight, images drawn by seed."""

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
"""Steps of the golden ratio fall evenly on a circle however many they are, so that an image's samples are of flavours
by weight too, and the first few seldom of one."""


class Tasks(Sequence[Task]):
    """Tasks in the order of their images, then of flavours, then of numbers; eight bytes each.

    Args:
        codes: Each task as `(place * flavours + flavour) * most + number`.
        most: More than any number.
        stems: Of each context's image, from `image_stem`.
        left_out: Images that cannot carry a flavour which is asked for, by flavour.
    """

    def __init__(self, codes: array[int], most: int, stems: list[str], left_out: Mapping[Flavour, int]) -> None:
        self._codes, self._most, self._stems = codes, most, stems
        self.left_out = dict(left_out)

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, index: Any) -> Any:
        """One task; or, for a slice, those tasks."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        rest, number = divmod(self._codes[index], self._most)
        place, kind = divmod(rest, len(FLAVOURS))
        flavour = FLAVOURS[kind]
        return Task(f"{self._stems[place]}-{flavour}-{number}", place, flavour, number)

    def counts(self) -> dict[Flavour, int]:
        """Tasks of each flavour."""
        found = [0] * len(FLAVOURS)
        for code in self._codes:
            found[code // self._most % len(FLAVOURS)] += 1
        return dict(zip(FLAVOURS, found, strict=True))


def image_stem(image: str) -> str:
    """An image's part of its tasks' ids.

    It depends on the image's own name and no other's, so that an id means the same image whatever else is there.

    Args:
        image: The image's name.

    Returns:
        `000000296284` for `000000296284.jpg`; for an image in a folder, or of another suffix, the stem and eight hex
        digits of the whole name's hash, since `a/1.jpg`, `b/1.jpg`, `1.jpg` and `1.png` share their stem.
    """
    own = image.rpartition("/")[2]
    stem, dot, suffix = own.rpartition(".")
    if dot and stem and suffix == "jpg" and own == image:
        return stem
    return f"{stem or own}-{sha256(image.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def can_carry(context: Context, flavour: Flavour) -> bool:
    """Whether enough is known of an image for a flavour.

    LLaVA's teacher had five captions and boxes for each (arXiv 2304.08485, section 3), so the paper gives no least.
    Captions alone tell who does what where, and everything may be made of one. A box alone tells what there is and
    where: enough to ask about, and to reason from with knowledge of such things. A detailed description has to say how
    things stand to each other; of one box, all but its label would be made up, so it needs two.

    Args:
        context: Of the image.
        flavour: What is to be made.

    Returns:
        Whether the teacher can be asked for it.
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
    """Decide what is made of which image.

    With `samples`, so many tasks are dealt to the flavours by weight (largest remainder; a tie goes to the flavour that
    is first). A flavour's images are drawn by seed: none a second time before all had their turn. More samples keep
    the images that fewer had, save where the largest remainder gives a flavour one task less.

    Without `samples`, every image has `samples_per_image` tasks, and which flavours depends on its name and the
    seed alone: by weight over all images, and spread within one. Other images, or more samples of each, leave them
    as they are. An image that cannot carry a flavour gets another.

    Args:
        contexts: What is known of the images.
        weights: Of the flavours; one that is missing, or 0, is not made.
        samples: How many; None makes some of every image.
        samples_per_image: Tasks of an image; with `samples`, the most of each flavour.
        seed: Of the draw.
        where: Prefix of the arguments' names in messages.

    Returns:
        The tasks, by image in order.

    Raises:
        UserError: For weights that are none, numbers below 1, and more samples than can be made.
    """
    prefix = f"{where}." if where else ""
    shares = _shares(weights, f"{prefix}weights")
    for name, value in (("samples", samples), ("samples_per_image", samples_per_image)):
        if value is not None and value < 1:
            raise UserError(f"{prefix}{name}: it is {value}; set it to 1 or more")
    images: list[str] = []
    carried: list[tuple[Flavour, ...]] = []
    known: dict[tuple[Flavour, ...], tuple[Flavour, ...]] = {}  # the same few tuples, for a hundred thousand images
    for context in contexts:
        images.append(context.image)
        flavours = tuple(flavour for flavour in shares if can_carry(context, flavour))
        carried.append(known.setdefault(flavours, flavours))
    if samples is None:
        tasks = _deal_to_images(images, carried, shares, samples_per_image, seed)
    else:
        places = {flavour: [i for i, flavours in enumerate(carried) if flavour in flavours] for flavour in shares}
        _check_samples(samples, samples_per_image, shares, {f: len(mine) for f, mine in places.items()}, prefix)
        tasks = _deal_to_flavours(images, places, deal(samples, shares), seed)
    kinds = {flavour: kind for kind, flavour in enumerate(FLAVOURS)}
    codes = ((place * len(kinds) + kinds[flavour]) * samples_per_image + number for place, flavour, number in tasks)
    left_out = {flavour: sum(flavour not in flavours for flavours in carried) for flavour in shares}
    return Tasks(array("Q", sorted(codes)), samples_per_image, [image_stem(image) for image in images], left_out)


def deal(count: int, shares: Mapping[Flavour, Fraction]) -> dict[Flavour, int]:
    """Whole numbers by share: what is over after rounding down goes to the largest remainders, one each.

    Args:
        count: Their sum.
        shares: Which sum to 1.

    Returns:
        Of each flavour, `count * share` rounded down or up.
    """
    dealt = {flavour: int(count * share) for flavour, share in shares.items()}
    by_remainder = sorted(shares, key=lambda flavour: dealt[flavour] - count * shares[flavour])
    for flavour in by_remainder[: count - sum(dealt.values())]:
        dealt[flavour] += 1
    return dealt


def _shares(weights: Mapping[Flavour, float], field: str) -> dict[Flavour, Fraction]:
    """What part each flavour has that is made at all, in the flavours' own order."""
    for name, weight in weights.items():
        if name not in FLAVOURS:
            raise UserError(
                f"{field}: {name!r} is no flavour{nearest(name, FLAVOURS)}; there are {', '.join(FLAVOURS)}"
            )
        if not isfinite(weight) or weight < 0:
            raise UserError(f"{field}: {name} has {weight}; set it to 0 or more")
    given = {flavour: Fraction(weights[flavour]) for flavour in FLAVOURS if weights.get(flavour)}
    if not given:
        raise UserError(f"{field}: no flavour has any weight; give one of {', '.join(FLAVOURS)} more than 0")
    total = sum(given.values())
    return {flavour: weight / total for flavour, weight in given.items()}


def _check_samples(
    samples: int, most: int, shares: Mapping[Flavour, Fraction], carriers: Mapping[Flavour, int], prefix: str
) -> None:
    """Hold that every flavour has images enough, and say how many samples can be made where one has not."""

    def short(count: int) -> Flavour | None:
        return next((f for f, wanted in deal(count, shares).items() if wanted > carriers[f] * most), None)

    lacking = short(samples)
    if lacking is None:
        return
    can = min(samples, *(int((carriers[flavour] * most + 1) / share) for flavour, share in shares.items()))
    while short(can):
        can -= 1
    raise UserError(
        f"{prefix}samples: of {samples:,}, {deal(samples, shares)[lacking]:,} are {lacking}, for which there are "
        f"{carriers[lacking]:,} images and {prefix}samples_per_image is {most}; by these weights {can:,} can be had"
    )


def _deal_to_flavours(
    images: Sequence[str], places: Mapping[Flavour, Sequence[int]], wanted: Mapping[Flavour, int], seed: int
) -> Iterator[tuple[int, Flavour, int]]:
    """Each flavour's tasks: place of the image, flavour, number."""
    for flavour, count in wanted.items():
        for number in range(-(-count // max(len(places[flavour]), 1))):
            left = count - number * len(places[flavour])
            order = places[flavour]
            if left < len(order):
                order = sorted(order, key=lambda place: _draw(f"{seed} {flavour} {number} {images[place]}"))[:left]
            yield from ((place, flavour, number) for place in order)


def _deal_to_images(
    images: Sequence[str],
    carried: Sequence[tuple[Flavour, ...]],
    shares: Mapping[Flavour, Fraction],
    most: int,
    seed: int,
) -> Iterator[tuple[int, Flavour, int]]:
    """Each image's tasks: place of the image, flavour, number."""
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
    """A number below 2 ** 64 that looks random and is the same everywhere, as that of `hash` is not."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
