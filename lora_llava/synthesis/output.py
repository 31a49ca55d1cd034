"""Output files of a data set: rows, rejections, summary, card and gallery."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path, PurePath
from typing import IO, Any

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.data.conversation import IMAGE_PLACEHOLDER
from lora_llava.data.files.row_files import json_text
from lora_llava.recipe import GenerateRecipe
from lora_llava.synthesis.contexts.reading_contexts import Contexts
from lora_llava.synthesis.dataset_card import write_card
from lora_llava.synthesis.gallery import Picks, render_gallery
from lora_llava.synthesis.gates.gates import REASONS, SeenSamples
from lora_llava.synthesis.gates.grounding import find_things
from lora_llava.synthesis.parse import CutTurns
from lora_llava.synthesis.pipeline import Result
from lora_llava.synthesis.sample import FLAVOURS, Flavour, Task, Turns

INSTRUCT_FILE, REJECTED_FILE, SUMMARY_FILE = "instruct.json", "rejected.jsonl", "summary.json"
CARD_FILE, GALLERY_FILE = "README.md", "gallery.html"
_SPEAKERS = {"user": "human", "assistant": "gpt"}
"""LLaVA's names of the roles."""
_MOST_FAILURES = 50
"""Maximum number of distinct failure reasons in the summary, since a server may send a different one each time."""
_MOST_MISSING = 10
"""Maximum number of things in the summary that no caption or box contains."""
_OTHER_FAILURES = "other reasons"


def write_set(
    folder: Path,
    *,
    results: Iterable[Result],
    contexts: Contexts,
    recipe: GenerateRecipe,
    about: Mapping[str, Any],
    answer_of: Callable[[Task, int], str | None] | None = None,
) -> dict[str, Any]:
    """Write the files of a data set, replacing those of an earlier run.

    The files are `instruct.json`, rows in LLaVA's form; `rejected.jsonl`, one line for each rejected answer, failed
    request and task that was not requested; `summary.json`; `README.md`, a data set card; and `gallery.html`. Each is
    written under a temporary name, and all are renamed at the end. Results are consumed one at a time.

    Every task is either in `instruct.json`, or has exactly one line in `rejected.jsonl` that is marked `given_up` or
    has the reason `failed` or `not asked`.

    Args:
        folder: Output folder; created if missing.
        results: Results in the order of the tasks; a duplicate of an earlier sample is counted as rejected.
        contexts: Contexts that the tasks' places index.
        recipe: The recipe; the gallery reads images from its `contexts.images`.
        about: Further entries of the summary: `ledger` (totals), `prompts` (hashes by flavour) and `recipe_hash`.
        answer_of: Function that returns the answer to a task's attempt for the gallery; without it, the gallery shows
            only the details of rejections.

    Returns:
        The summary.

    Raises:
        UserError: If the folder cannot be written.
        ValueError: If a sample is empty or contains an image placeholder, or a result has an unknown status.
    """
    tally, picks = _Tally(), Picks(recipe.seed)
    name = folder.resolve().name
    with _temporary_files(folder) as parts:
        with _open(parts[INSTRUCT_FILE]) as rows, _open(parts[REJECTED_FILE]) as rest:
            for result in progress_bar(
                _without_duplicates(results), desc="writing", unit=" samples", delay=1, leave=False
            ):
                image = contexts.images[result.task.place]
                if result.status == "accepted":
                    rows.write((",\n" if tally.rows else "[\n") + json_text(_row(result, image)))
                rest.writelines(f"{json_text(line)}\n" for line in _lines(result, image))
                tally.add(result, contexts)
                picks.add(result)
            rows.write("\n]\n" if tally.rows else "[]\n")
        beside = _within(recipe.contexts.images, folder)
        summary = {**_summary(tally, contexts, recipe), "image_folder": beside, **about}
        texts = {
            SUMMARY_FILE: json_text(summary, indent=2) + "\n",
            CARD_FILE: write_card(name, summary),
            GALLERY_FILE: render_gallery(name, summary, picks, contexts, recipe.contexts.images, answer_of),
        }
        for file, text in texts.items():
            parts[file].write_text(text, encoding="utf-8", newline="\n")
    return summary


@contextmanager
def _temporary_files(folder: Path) -> Iterator[dict[str, Path]]:
    """Yield a temporary path for each file; all are renamed at the end, and removed after an error."""
    names = (INSTRUCT_FILE, REJECTED_FILE, SUMMARY_FILE, CARD_FILE, GALLERY_FILE)
    parts = {name: folder / f".{name}.tmp" for name in names}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield parts
            for name, part in parts.items():
                part.replace(folder / name)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
    except OSError as error:
        fix = "free disk space or fix its permissions, and run the same command again: no answer is lost"
        raise UserError(f"{folder} cannot be written ({error.strerror or error}); {fix}") from None


def _open(file: Path) -> IO[str]:
    return file.open("w", encoding="utf-8", newline="\n")


def _without_duplicates(results: Iterable[Result]) -> Iterator[Result]:
    """Yield the results, with duplicates of earlier samples turned into rejections."""
    seen = SeenSamples()
    for result in results:
        if result.status not in ("accepted", "rejected", "failed", "not asked"):
            raise ValueError(f"{result.task.task_id}: unknown status {result.status!r}")
        duplicate = result.status == "accepted" and seen.check(result.task.task_id, result.turns, result.task.flavour)
        yield replace(result, status="rejected", rejections=(*result.rejections, duplicate)) if duplicate else result


def _row(result: Result, image: str) -> dict[str, Any]:
    """Return a sample in LLaVA's form, with the image placeholder before the first question."""
    if not result.turns or any(IMAGE_PLACEHOLDER in turn.text for turn in result.turns):
        raise ValueError(
            f"{result.task.task_id}: the sample is empty or contains {IMAGE_PLACEHOLDER}, which the gates should reject"
        )
    turns = [{"from": _SPEAKERS[turn.role], "value": turn.text} for turn in result.turns]
    turns[0]["value"] = f"{IMAGE_PLACEHOLDER}\n{turns[0]['value']}"
    return {"id": result.task.task_id, "image": image, "conversations": turns, "category": result.task.flavour}


def _lines(result: Result, image: str) -> Iterator[dict[str, Any]]:
    """Yield a task's lines in `rejected.jsonl`; attempts are counted from 0, as in the ledger."""
    task = result.task
    head = {"task_id": task.task_id, "flavour": task.flavour, "image": image}
    for attempt, rejection in enumerate(result.rejections):
        line = {**head, "attempt": attempt, "reason": rejection.reason, "detail": rejection.detail}
        last = attempt + 1 == len(result.rejections)
        yield {**line, "given_up": True} if last and result.status == "rejected" else line
    if result.status == "rejected" and not result.rejections:
        raise ValueError(f"{task.task_id}: the status is rejected, but there is no rejection")
    if result.status in ("failed", "not asked"):
        yield {**head, "attempt": len(result.rejections), "reason": result.status, "detail": result.reason}


@dataclass
class _Tally:
    """Running counts of the results."""

    rows: int = 0
    images: int = 0
    by_flavour: dict[Flavour, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in FLAVOURS})
    reasons: dict[str, Counter[str]] = field(default_factory=lambda: {reason: Counter() for reason in REASONS})
    failures: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    things: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    _place: int = -1

    def add(self, result: Result, contexts: Contexts) -> None:
        counts = self.by_flavour[result.task.flavour]
        counts.update(("tasks", result.status))
        if result.status == "accepted":
            self.rows += 1
            self.images += result.task.place != self._place  # tasks of an image follow one another
            self._place = result.task.place
            counts.update(_sizes(result.turns))
            self.cut += isinstance(result.turns, CutTurns)
            things = find_things(contexts[result.task.place], result.turns, result.task.flavour != "detail")
            self.things += things.total
            self.missing.update(things.missing)
        elif result.status == "failed":
            known = result.reason in self.failures or len(self.failures) < _MOST_FAILURES
            self.failures[result.reason if known else _OTHER_FAILURES] += 1
        self._add_rejections(result)
        if result.model:
            self.models[result.model] += 1

    def _add_rejections(self, result: Result) -> None:
        reasons = [rejection.reason for rejection in result.rejections]
        for reason in reasons:
            self.reasons[reason]["attempts"] += 1
        for reason in set(reasons):
            self.reasons[reason]["tasks"] += 1
        if result.status == "rejected":
            self.reasons[reasons[-1]]["given_up"] += 1


def _sizes(turns: Turns) -> Counter[str]:
    """Count the answers of a sample and their words."""
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    return Counter(turns=len(answers), words=sum(len(answer.split()) for answer in answers))


def _summary(tally: _Tally, contexts: Contexts, recipe: GenerateRecipe) -> dict[str, Any]:
    total: Counter[str] = sum(tally.by_flavour.values(), Counter())
    by_reason = sorted(tally.reasons.items(), key=lambda item: -item[1]["attempts"])
    teacher = recipe.teacher
    files = {name: getattr(recipe.contexts, name) for name in ("captions", "instances", "contexts", "boxes")}
    models: Counter[str] = Counter()
    for name, count in tally.models.items():
        models[_bare(name)] += count
    return {
        "complete": not total["failed"] and not total["not asked"],
        **_statuses(total),
        "turns": total["turns"],
        "images": tally.images,
        "cut_off_kept": tally.cut,
        "flavours": {
            flavour: {
                **_statuses(counts),
                "turns": counts["turns"],
                "words_per_answer": round(counts["words"] / counts["turns"], 1) if counts["turns"] else None,
            }
            for flavour, counts in tally.by_flavour.items()
            if counts["tasks"]
        },
        "reasons": {
            reason: {name: counts[name] for name in ("attempts", "tasks", "given_up")}
            for reason, counts in by_reason
            if counts
        },
        "ungrounded": {
            "things": tally.things,
            "missing": (missing := tally.missing.total()),
            "share": round(missing / tally.things, 4) if tally.things else None,
            "most_common": dict(tally.missing.most_common(_MOST_MISSING)),
        },
        "failures": dict(tally.failures.most_common()),
        "contexts": {
            **asdict(contexts.report),
            "files": {name: PurePath(path).name for name, path in files.items() if path},
        },
        "teacher": {
            "backend": teacher.backend,
            "model": _bare(teacher.model) if teacher.model else None,
            "answered_as": dict(models.most_common()),
            **{name: getattr(teacher, name) for name in ("temperature", "top_p", "max_tokens", "structured")},
        },
        "flavour_weights": recipe.flavours.model_dump(),
        "gates": recipe.gates.model_dump(),
        "seed": recipe.seed,
        "versions": {"python": platform.python_version(), **{x: metadata.version(x) for x in ("lora_llava", "openai")}},
    }


def _statuses(counts: Counter[str]) -> dict[str, int]:
    """Return the counts of statuses under the summary's keys."""
    names = {"tasks": "tasks", "rows": "accepted", "rejected": "rejected", "failed": "failed", "not_asked": "not asked"}
    return {name: counts[status] for name, status in names.items()}


def _within(images: str | None, folder: Path) -> str | None:
    """Return the image folder relative to the data set's folder; None if it is not inside."""
    path = Path(images).resolve() if images else None
    return path.relative_to(folder.resolve()).as_posix() if path and path.is_relative_to(folder.resolve()) else None


def _bare(name: str) -> str:
    """Strip the folders of this machine from a file's or model's name; Hub ids are returned unchanged."""
    plain = name.replace("\\", "/").rstrip("/")
    is_path = plain.startswith(("/", ".", "~")) or plain[1:3] == ":/" or Path(name).exists()
    return PurePath(plain).name if is_path else name
