"""The splits of a run that continues another: no row changes sides, by the content of its images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from lora_llava.core.errors import UserError
from lora_llava.splits.hold_out import draw_groups, link_rows
from lora_llava.splits.seen_rows import HELD_OUT, RowContent, SeenRows

TRAIN = "train"


@dataclass
class Assignment:
    """The rows of a source by split.

    Attributes:
        train: Rows to train on.
        parts: Held-out rows by split, for each split that the recipe draws.
        notes: Lines about rows whose side is that of the earlier run.
    """

    train: list[int]
    parts: dict[str, list[int]]
    notes: list[str] = field(default_factory=list)


def known_sides(seen: SeenRows) -> dict[str, str]:
    """Return the split of every key that earlier runs saw; a trained one is `train`, even if it was also held out."""
    sides = {key: name for name in HELD_OUT for key in seen.held_out(name)}
    return sides | dict.fromkeys(seen.trained.keys, TRAIN)


def assign_rows(
    contents: Sequence[RowContent],
    names: Sequence[Sequence[Hashable]],
    counts: Mapping[str, int],
    seed: int,
    seen: SeenRows,
    sourced: Container[str] = (),
) -> Assignment:
    """Assign rows to splits: those that earlier runs held out stay held out, those that they trained are trained.

    Args:
        contents: The content of each row.
        names: Further keys that keep rows on one side, from `row_keys`.
        counts: The least number of rows of each split that the recipe draws.
        seed: Seeds the draw among new rows.
        seen: The rows of earlier runs.
        sourced: Splits that have a source of their own.

    Returns:
        The assignment. Rows that earlier runs held out in a split that the recipe does not draw are in none, nor are
        rows that link trained images to held-out ones.

    Raises:
        UserError: If a split would have no rows, or all new rows would be held out.
    """
    known = known_sides(seen)
    own = _own_sides(contents, known)
    groups = link_rows(
        [[*row.keys, *more] if side != "mixed" else [] for row, more, side in _zip(contents, names, own)]
    )
    sides = _group_sides(contents, groups, own, known)
    drawable = [side == "new" and bool(row.keys) for side, row in zip(sides, contents, strict=True)]
    blocked = {group for group, side, ok in zip(groups, sides, drawable, strict=True) if side == "new" and not ok}
    drawable = [ok and group not in blocked for ok, group in zip(drawable, groups, strict=True)]
    parts = {name: [i for i, side in enumerate(sides) if side == name] for name in counts}
    missing = {name: max(0, count - len(parts[name])) for name, count in counts.items()}
    drawn = draw_groups(groups, drawable, list(missing.values()), seed)
    taken = {row for part in drawn for row in part}
    for name, part in zip(counts, drawn, strict=True):
        parts[name] = sorted([*parts[name], *part])
    train = [i for i, side in enumerate(sides) if side == TRAIN or (side == "new" and i not in taken)]
    _refuse_empty(parts, counts, [i for i, side in enumerate(sides) if side == "new"], taken, seen)
    return Assignment(train, parts, _notes(sides, parts, counts, seen, sourced))


def _zip(
    contents: Sequence[RowContent], names: Sequence[Sequence[Hashable]], sides: Sequence[str]
) -> zip[tuple[RowContent, Sequence[Hashable], str]]:
    return zip(contents, names, sides, strict=True)


def _own_sides(contents: Sequence[RowContent], known: Mapping[str, str]) -> list[str]:
    """Return the side of each row by its own keys: a split, `new`, or `mixed` for trained and held-out images."""
    return [_joined({known[key] for key in row.keys if key in known}) for row in contents]


def _joined(sides: set[str]) -> str:
    if "mixed" in sides or (TRAIN in sides and len(sides) > 1):
        return "mixed"
    return next((name for name in (TRAIN, "test", "validation") if name in sides), "new")


def _group_sides(
    contents: Sequence[RowContent], groups: Sequence[int], own: Sequence[str], known: Mapping[str, str]
) -> list[str]:
    """Return the side of each row, which is that of its group."""
    of_group: dict[int, set[str]] = {}
    for group, side in zip(groups, own, strict=True):
        of_group.setdefault(group, set()).update({side} - {"new"})
    sides = []
    for row, group, side in zip(contents, groups, own, strict=True):
        joined = _joined(of_group[group])
        if side != "mixed" and joined == "mixed":  # new images link both sides: only rows that are known stay
            joined = side if row.keys and all(key in known for key in row.keys) else "mixed"
        sides.append(joined)
    return sides


def _refuse_empty(
    parts: Mapping[str, Sequence[int]], counts: Mapping[str, int], new: Sequence[int], taken: set[int], seen: SeenRows
) -> None:
    for name, part in parts.items():
        if not part:
            raise UserError(
                f"data.{name}_rows is {counts[name]}, but {seen.run} trained the images of all rows; add new rows, "
                f"name held-out ones with data.{name}_source, or set data.{name}_rows=0"
            )
    if new and len(taken) == len(new):
        counted = ", ".join(f"data.{name}_rows is {count}" for name, count in counts.items())
        kept = {name: len(part) - len(taken.intersection(part)) for name, part in parts.items()}
        raise UserError(
            f"{counted}, which holds out all {len(new)} rows that {seen.run} did not have; leave some to train on: "
            f"{', '.join(f'{count} rows of {name} stay held out' for name, count in kept.items())} already"
        )


def _notes(
    sides: Sequence[str],
    parts: Mapping[str, Sequence[int]],
    counts: Mapping[str, int],
    seen: SeenRows,
    sourced: Container[str],
) -> list[str]:
    found = Counter(sides)
    notes = [seen.warning] if seen.warning else []
    kept = {name: found[name] for name in parts if found[name]}
    if kept:
        split = " and ".join(f"{count:,} in {name}" for name, count in kept.items())
        notes.append(f"{_rows(sum(kept.values()), 'held-out row')} of {seen.run} {_stay(kept)} held out: {split}")
    if counts and found[TRAIN]:
        notes.append(f"{_rows_are(found[TRAIN])} not held out: {_trained_in(found[TRAIN], seen)}")
    for name, count in counts.items():
        if len(parts[name]) < count:
            notes.append(f"{name} has {_rows(len(parts[name]))}, fewer than data.{name}_rows {count}")
    for name in HELD_OUT:
        if name not in parts and found[name]:
            fix = "" if name in sourced else f"; set data.{name}_rows={found[name]} to evaluate them"
            notes.append(
                f"{_rows_are(found[name])} neither trained nor evaluated: held out for {name} in {seen.run}{fix}"
            )
    if found["mixed"]:
        notes.append(
            f"{_rows_are(found['mixed'])} left out, with images that {seen.run} trained and images that it held out"
        )
    return notes


def _stay(kept: Mapping[str, int]) -> str:
    return "stays" if sum(kept.values()) == 1 else "stay"


def _rows_are(count: int) -> str:
    return f"{_rows(count)} {'is' if count == 1 else 'are'}"


def _trained_in(count: int, seen: SeenRows) -> str:
    return f"{'its' if count == 1 else 'their'} images or questions were trained in {seen.run}"


def _rows(count: int, what: str = "row") -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def keep_untrained(
    contents: Sequence[RowContent], split: str, seen: SeenRows, what: str
) -> tuple[list[int], list[str]]:
    """Return the rows of a named held-out source or published split that earlier runs did not train.

    Args:
        contents: The content of each row.
        split: Name of the split.
        seen: The rows of earlier runs.
        what: The recipe's field of the split, for messages.

    Returns:
        The rows, and lines about the others. A row that an earlier run held out stays.

    Raises:
        UserError: If no row is left.
    """
    before = seen.held_out_rows
    kept = [
        i
        for i, row in enumerate(contents)
        if row.row in before or not any(key in seen.trained.keys for key in row.keys)
    ]
    left_out = len(contents) - len(kept)
    if contents and not kept:
        raise UserError(f"{what}: {seen.run} trained the images of all its {_rows(len(contents))}; name other rows")
    if not left_out:
        return kept, []
    return kept, [f"{_rows_are(left_out)} kept out of {split}, of {len(contents):,}: {_trained_in(left_out, seen)}"]
