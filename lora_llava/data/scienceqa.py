"""Read ScienceQA as conversations, with the texts of LLaVA's converter (scripts/convert_sqa_to_llava.py)."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lora_llava.core.errors import UserError, nearest
from lora_llava.core.storage import looked_in
from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation, ImagePosition, Turn, place_image
from lora_llava.data.images.image_sources import FolderImages, ImageSource, TableImages
from lora_llava.data.images.to_rgb import Background
from lora_llava.data.typed import as_typed

PromptOrder = Literal["QCM-LEA", "QCM-ALE", "CQM-A"]
PROMPT_ORDERS: tuple[PromptOrder, ...] = get_args(PromptOrder)
LETTERS = "ABCDE"


def format_problem(problem: Mapping[str, Any], order: PromptOrder = "QCM-LEA") -> tuple[str, str]:
    """Write one problem as a question and its answer.

    Args:
        problem: An entry of `problems.json`: `question`, `choices`, `answer`, `hint`, `lecture`, `solution`.
        order: What the question holds, then what the answer holds: Question, Context, Multiple options; Answer,
            Lecture, Explanation.

    Returns:
        The question and the answer, without an image placeholder.
    """
    question = problem["question"]
    context = problem.get("hint") or "N/A"
    options = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(problem["choices"]))
    letter = LETTERS[problem["answer"]]
    lecture, solution = (problem.get(key) or "" for key in ("lecture", "solution"))
    lecture, solution = (text.replace("\\n", "\n") for text in (lecture, solution))
    if order == "CQM-A":
        prompt = f"Context: {context}\nQuestion: {question}\nOptions: {options}"
    else:
        prompt = f"Question: {question}\nContext: {context}\nOptions: {options}"
    answer = {
        "QCM-LEA": f"{lecture} {solution} The answer is {letter}.",
        "QCM-ALE": f"The answer is {letter}. BECAUSE: {lecture} {solution}",
        "CQM-A": f"The answer is {letter}.",
    }[order]
    # The converter folds double spaces in one pass before it removes the prefixes: an answer with neither lecture nor
    # solution keeps its leading space.
    return _fold(prompt).removeprefix("Question: "), _fold(f"Answer: {answer}").removeprefix("Answer: ")


def _fold(text: str) -> str:
    folded = text.replace("  ", " ").strip()
    return folded.removesuffix("BECAUSE:").strip() if folded.endswith("BECAUSE:") else folded


class ScienceQASplit(NamedTuple):
    """The rows of a split and their images."""

    conversations: list[Conversation]
    images: ImageSource


def load_scienceqa(
    path: str | Path,
    split: str,
    *,
    order: PromptOrder = "QCM-LEA",
    image_position: ImagePosition = "first",
    seed: int = 0,
    image_folder: str | Path | None = None,
    max_image_pixels: int = 50_000_000,
    revision: str | None = None,
    background: Background = "white",
    follow_links: bool = False,
) -> ScienceQASplit:
    """Read one split of ScienceQA.

    Args:
        path: The official folder (`problems.json`, `pid_splits.json`, `images/{split}/{id}/image.png`), a folder of
            parquet files, or a Hub id with the fields of derek-thomas/ScienceQA.
        split: `train`, `val` or `test` (in parquet `validation` for `val`), or another key of `pid_splits.json`.
        order: See `format_problem`.
        image_position: Place of the image in the question.
        seed: Seeds the coin of `image_position="random"`, separately for each row.
        image_folder: Root folder of the images; default: `path/images`.
        max_image_pixels: Most pixels of an image.
        revision: Branch, tag or commit of a Hub id.
        background: See `to_rgb`.
        follow_links: Whether links may lead out of the image folder.

    Returns:
        The rows as conversations of one question and one answer, and their images.

    Raises:
        UserError: If a folder or file is missing, the split is unknown or empty, or a problem lacks a field.
    """
    folder = Path(path)
    if (folder / "problems.json").is_file() or (folder.is_dir() and not list(folder.rglob("*.parquet"))):
        problems = read_problems(folder / "problems.json", folder / "pid_splits.json", split)
        root = Path(image_folder) if image_folder else folder / "images"
        images: ImageSource = FolderImages(
            root,
            max_image_pixels,
            background=background,
            follow_links=follow_links,
            match_names=False,  # every file is called image.png
        )
        names = {
            pid: f"{problem.get('split') or split}/{pid}/{problem['image']}"
            for pid, problem in problems.items()
            if problem.get("image")
        }
    else:
        table = _read_parquet(folder, path if isinstance(path, str) else str(path), split, revision)
        problems = {str(i): dict(row) for i, row in enumerate(table.remove_columns("image"))}
        images = TableImages(table, max_image_pixels, background=background)
        names = {str(i): str(i) for i, image in enumerate(table["image"]) if image}
    if not problems:
        raise UserError(f"data.splits: split {split!r} of {path} is empty; name another, or set null if it is optional")
    rows = [
        _conversation(pid, problem, names.get(pid), order, image_position, seed) for pid, problem in problems.items()
    ]
    return ScienceQASplit(rows, images)


def read_problems(problems: Path, splits: Path, split: str) -> dict[str, dict[str, Any]]:
    """Read the problems of one split from the official files.

    Returns:
        Problems by id, in the split's order.

    Raises:
        UserError: If a file is missing, the split is unknown, an id has no problem, or a problem lacks a field.
    """
    for file in (problems, splits):
        if not file.is_file():
            raise UserError(f"{file} is missing; a ScienceQA folder holds problems.json, pid_splits.json and images/")
    entries, ids = (_read_json(file) for file in (problems, splits))
    for file, content in ((problems, entries), (splits, ids)):
        if not isinstance(content, dict):
            raise UserError(f"{file}: it should hold an object by id or split; it holds a {type(content).__name__}")
    if split not in ids:
        raise UserError(f"{splits}: no split {split!r}{nearest(split, ids)}; it has {', '.join(ids)}")
    if not isinstance(ids[split], list) or not all(isinstance(pid, str) for pid in ids[split]):
        raise UserError(f"{splits}: split {split!r} is {ids[split]!r:.60}; it should be a list of ids as strings")
    missing = [pid for pid in ids[split] if not isinstance(entries.get(pid), dict)]
    if missing:
        raise UserError(f"{splits}: split {split!r} names problem {missing[0]}, which {problems.name} lacks")
    return {pid: entries[pid] for pid in ids[split]}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {str(error).splitlines()[0]}") from None


def _conversation(
    pid: str, problem: Mapping[str, Any], image: str | None, order: PromptOrder, position: ImagePosition, seed: int
) -> Conversation:
    extra = question_of(pid, problem) | {"has_image": bool(image)}
    question, reply = (as_typed(text, [IMAGE_PLACEHOLDER]) for text in format_problem(problem, order))
    if image:
        question = place_image(question, position, random.Random(f"{seed}-{pid}"))
    return Conversation(pid, (Turn("user", question), Turn("assistant", reply)), (image,) if image else (), extra)


def question_of(pid: str, problem: Mapping[str, Any]) -> dict[str, Any]:
    """Return what scoring an answer needs of a problem.

    Args:
        pid: The problem's id, for messages.
        problem: An entry of `problems.json`.

    Returns:
        `answer`, `num_choices`, `subject`, `grade`, `has_image` and `has_hint`; and for other prompts
        `question`, `choices` and `hint`.

    Raises:
        UserError: If a field is missing or of the wrong type.
    """
    for field, kind in (("question", str), ("choices", list), ("answer", int)):
        if field not in problem:
            raise UserError(f"row {pid}: the field '{field}' is missing; add it")
        if field != "answer" and not isinstance(problem[field], kind):
            raise UserError(f"row {pid}: {field} is {problem[field]!r}; it should be a {kind.__name__}")
    for field in ("hint", "lecture", "solution"):
        if not isinstance(problem.get(field) or "", str):
            raise UserError(f"row {pid}: {field} is {problem[field]!r:.60}; it should be a string")
    choices, answer = problem["choices"], problem["answer"]
    fits = isinstance(answer, int) and 0 <= answer < len(choices) and 2 <= len(choices) <= len(LETTERS)
    if not fits:
        raise UserError(f"row {pid}: answer is {answer!r}; it should index its {len(choices)} choices (2 to 5)")
    return {
        "answer": answer,
        "num_choices": len(choices),
        "subject": str(problem.get("subject", "")),
        "grade": str(problem.get("grade", "")),
        "has_image": bool(problem.get("image")),
        "has_hint": bool(problem.get("hint")),
        "question": problem["question"],
        "choices": list(choices),
        "hint": problem.get("hint") or "",
    }


def _parquet_files(folder: Path, split: str) -> list[str]:
    hub_split = {"val": "validation"}.get(split, split)
    return sorted(str(file) for file in folder.rglob(f"{hub_split}-*.parquet"))


def _read_parquet(folder: Path, path: str, split: str, revision: str | None) -> Any:
    import datasets  # slow to import, and only needed here

    if folder.is_dir() and not _parquet_files(folder, split):
        found = sorted({file.name.split("-")[0] for file in folder.rglob("*.parquet")})
        raise UserError(f"{path}: no split {split!r}{nearest(split, found)}; it has {', '.join(found)}")
    try:
        if folder.is_dir():
            table = datasets.load_dataset("parquet", data_files=_parquet_files(folder, split), split="train")
        else:
            hub_split = {"val": "validation"}.get(split, split)
            table = datasets.load_dataset(path, split=hub_split, revision=revision)
    except Exception as error:  # the library raises many kinds of errors for a missing name
        problem = f"{path}{looked_in(path)}, split {split!r}, cannot be read: {str(error).splitlines()[0]}"
        raise UserError(f"data.path: {problem}; name a ScienceQA folder or a Hub id") from None
    if "image" not in table.column_names:
        raise UserError(
            f"data.path: {path}, split {split!r}, has no column image; it has {', '.join(table.column_names)}"
        )
    return table.cast_column("image", datasets.Image(decode=False))
