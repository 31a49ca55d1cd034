"""VQA v2: a file of questions and a file of their annotations, joined by `question_id`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.data.folder_kinds.folder_kind import (
    ConvertedFolder,
    FolderKind,
    FolderOptions,
    ImageFinder,
    counted,
    image_files,
    split_of,
)
from lora_llava.data.folder_kinds.label_files import json_object


class VqaPairs(FolderKind):
    """`{"questions": [...]}` and `{"annotations": [...]}` with the same `question_id`s."""

    summary = "VQA v2 questions and annotations"

    def find(self, folder: Path, files: Sequence[Path]) -> list[Path]:
        return [file for file in files if _listed(file, "questions") or _listed(file, "annotations")]

    def convert(self, folder: Path, files: Sequence[Path], options: FolderOptions) -> ConvertedFolder:
        beside = sorted(set(files) | set(self.find(folder, list(files[0].parent.glob("*.json")))))
        questions = [file for file in files if _listed(file, "questions")] or [
            file for file in beside if _listed(file, "questions")
        ]
        answers = _answers([file for file in beside if _listed(file, "annotations")])
        if not questions or not answers:
            lacks = "questions" if answers else "annotations"
            raise UserError(
                f"{files[0]}: VQA v2 has two files, and the one with {lacks} is not in {folder}; put it there"
            )
        found = ConvertedFolder(self.summary)
        finder = ImageFinder(folder, options.follow_links, found.left_out)
        stems = _by_number(folder, options.follow_links)
        kinds: Counter[str] = Counter()
        asked = set()
        for file in questions:
            for each in _listed(file, "questions"):
                asked.add(each["question_id"])
                row = _row(file, folder, each, answers, stems, finder, found)
                if row is not None:
                    kinds[row["question_type"]] += 1
                    found.add(_split(file, folder), row)
        for key in sorted(answers.keys() - asked, key=str):
            found.left_out.add("annotations without a question", key)
        if not found.splits.get("train"):
            raise UserError(_no_rows(folder, questions, found))
        found.facts.append(("files", ", ".join(file.name for file in beside)))
        found.facts.append(("answer", "multiple_choice_answer, or else the answer most people gave"))
        found.facts.append(("questions by type", counted(kinds)))
        return found


def _no_rows(folder: Path, questions: Sequence[Path], found: ConvertedFolder) -> str:
    reasons = "; ".join(found.left_out.lines())
    if found.splits:
        return f"{folder}: only held-out questions have answers ({questions[0].name}); add those to train on: {reasons}"
    return f"{questions[0]}: no question has both an answer and an image in {folder}; add what is missing: {reasons}"


def _listed(file: Path, key: str) -> list[Mapping[str, Any]]:
    content = json_object(file).get(key)
    if not isinstance(content, list):
        return []
    return [each for each in content if isinstance(each, Mapping) and isinstance(each.get("question_id"), (int, str))]


def _split(file: Path, folder: Path) -> str:
    subtype = json_object(file).get("data_subtype")
    return split_of(folder / f"{subtype}_{file.name}" if isinstance(subtype, str) else file, folder)


def _answers(files: Sequence[Path]) -> dict[Any, tuple[str, str]]:
    """Return the answer and the type of each question."""
    found: dict[Any, tuple[str, str]] = {}
    for file in files:
        for each in _listed(file, "annotations"):
            text = each.get("multiple_choice_answer")
            if not isinstance(text, str) or not text.strip():
                given = each.get("answers")
                listed = [a.get("answer") for a in given if isinstance(a, Mapping)] if isinstance(given, list) else []
                people = [str(answer) for answer in listed if answer]
                text = Counter(people).most_common(1)[0][0] if people else ""
            kind = each.get("answer_type")
            found.setdefault(each["question_id"], (text.strip(), kind if isinstance(kind, str) and kind else "other"))
    return found


def _by_number(folder: Path, follow_links: bool) -> dict[int, list[str]]:
    """Return the images by the number at the end of their name, by which VQA's `image_id` names them."""
    found: dict[int, list[str]] = {}
    for file in image_files(folder, follow_links):
        digits = file.stem[len(file.stem.rstrip("0123456789")) :]
        if digits and len(digits) < 19:
            found.setdefault(int(digits), []).append(file.relative_to(folder).as_posix())
    return found


def _row(
    file: Path,
    folder: Path,
    question: Mapping[str, Any],
    answers: Mapping[Any, tuple[str, str]],
    stems: Mapping[int, list[str]],
    finder: ImageFinder,
    found: ConvertedFolder,
) -> dict[str, Any] | None:
    key, text = question["question_id"], question.get("question")
    answer, kind = answers.get(key, ("", ""))
    if not isinstance(text, str) or not text.strip():
        found.left_out.add("questions without text", key)
        return None
    if not answer:
        found.left_out.add("questions without an answer", key)
        return None
    number = question.get("image_id")
    images = stems.get(number, []) if isinstance(number, int) else []
    subtype = json_object(file).get("data_subtype")
    if len(images) > 1:
        images = [each for each in images if str(subtype) in each] or images
    if len(images) > 1:
        images = [each for each in images if split_of(folder / each, folder) == _split(file, folder)] or images
    if len(images) > 1:
        found.left_out.add("questions whose image_id fits several files", f"{key}: {', '.join(images[:3])}")
        return None
    image = images[0] if images else finder.find(str(number), what="questions")
    if image is None:
        return None
    row_id = f"{file.name} question {key}"
    return {"id": row_id, "image": image, "question": text.strip(), "answer": answer, "question_type": kind}
