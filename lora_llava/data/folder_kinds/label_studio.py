"""Label Studio's JSON and JSON_MIN exports: choices, texts and labelled boxes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from lora_llava.core.errors import UserError
from lora_llava.data.folder_kinds.box_questions import BoxedImage, ObjectBox, add_box_questions, box_kinds
from lora_llava.data.folder_kinds.column_words import role_of
from lora_llava.data.folder_kinds.folder_kind import (
    ConvertedFolder,
    FolderKind,
    FolderOptions,
    ImageFinder,
    ask_question,
    class_question,
    class_text,
    counted,
    is_only_class,
    split_of,
)
from lora_llava.data.folder_kinds.label_files import first_of_list, json_list
from lora_llava.data.formats import IMAGE_SUFFIXES

_UPLOAD = re.compile(r"[0-9a-f]{8}-")
"""What Label Studio puts before the name of an uploaded file."""
_SHAPES = ("rectanglelabels", "polygonlabels", "ellipselabels")
_OTHER_SHAPES = re.compile(r".*labels|rectangle|polygon|ellipse|brush|keypoint|vector|bitmask")
"""Types of results that show where something is; where they are not read, what an image lacks is unknown."""
_KEYS_OF_MIN = {"annotation_id", "annotator", "lead_time"}
_OTHERS_OF_MIN = {*_KEYS_OF_MIN, "id", "created_at", "updated_at"}
"""Keys of JSON_MIN that are about the task itself."""
_ABOUT_IMAGE = {"choices": "choices", "textarea": "text", "rating": "rating", "number": "number"}
"""Types of results about the whole image, with the key of their value."""
_DESCRIBE = "Describe the image briefly."


class LabelStudio(FolderKind):
    """`[{"data": {"image"}, "annotations": [{"result": [...]}]}]`, or JSON_MIN with the results beside the image."""

    summary = "Label Studio's export"

    def find(self, folder: Path, files: Sequence[Path]) -> list[Path]:
        return [file for file in files if _is_task(first_of_list(file))]

    def convert(self, folder: Path, files: Sequence[Path], options: FolderOptions) -> ConvertedFolder:
        box_kinds(options)
        found = ConvertedFolder(self.summary)
        finder = ImageFinder(folder, options.follow_links, found.left_out)
        tasks = [task for file in files for task in _tasks(folder, file, finder, found)]
        _add_choices(found, tasks, options)
        _add_texts(found, tasks, options)
        boxed = [
            BoxedImage(task.name, task.image, task.split, tuple(task.boxes))
            for task in tasks
            if not task.has_others and (task.boxes or task.is_empty)
        ]
        if any(each.boxes for each in boxed):
            add_box_questions(found, boxed, options)
        for task in tasks:
            if task.boxes and task.has_others:
                found.left_out.add("boxes of images with other annotations that are not read", task.name)
            if not (task.choices or task.texts or task.boxes or task.is_empty):
                found.left_out.add("tasks without an annotation that is read", task.name)
        if not found.splits:
            raise UserError(
                f"{files[0]}: no task has an image in {folder} and an annotation of choices, textarea or "
                f"rectanglelabels; {'; '.join(found.left_out.lines())}; export JSON, and put the images beside it"
            )
        return found


def _is_task(first: Any) -> bool:
    if not isinstance(first, Mapping):
        return False
    data = first.get("data")
    return (isinstance(data, Mapping) and isinstance(first.get("annotations"), list)) or (
        len(_KEYS_OF_MIN & first.keys()) > 1
    )


class _Task:
    """The image of a task and what was said about it, by the name of the control."""

    def __init__(self, name: str, image: str, split: str, asked: str | None) -> None:
        self.name, self.image, self.split, self.asked = name, image, split, asked
        self.choices: dict[str, Counter[str]] = {}
        self.texts: dict[str, Counter[str]] = {}
        self.boxes: list[ObjectBox] = []
        self.is_empty = self.has_others = False


def _tasks(folder: Path, file: Path, finder: ImageFinder, found: ConvertedFolder) -> Iterator[_Task]:
    beside = file.parent.relative_to(folder).as_posix() if file.parent.is_relative_to(folder) else ""
    for place, entry in enumerate(json_list(file)):
        name = f"{file.name} task {entry.get('id', place) if isinstance(entry, Mapping) else place}"
        if not _is_task(entry):
            found.left_out.add("tasks that are not in Label Studio's form", name)
            continue
        data = entry["data"] if isinstance(entry.get("data"), Mapping) else entry
        image = finder.find(_file_named(data, finder), beside, "tasks")
        if image is None:
            continue
        asked = next((v for k, v in data.items() if role_of(str(k)) == "question" and isinstance(v, str)), None)
        task = _Task(name, image, split_of(file, folder), asked.strip() if asked else None)
        for index, results in enumerate(_results(entry, found, name)):
            task.is_empty = task.is_empty or not results
            for result in results:
                _read_result(task, result, index == 0, found)
        yield task


def _file_named(data: Mapping[str, Any], finder: ImageFinder) -> str | None:
    """Return the file name of a task's image, without Label Studio's address and upload prefix."""
    values = {str(k): v for k, v in data.items() if isinstance(v, str)}
    value = next((v for k, v in values.items() if role_of(k) == "image"), None) or next(
        (v for v in values.values() if urlsplit(v).path.lower().endswith(IMAGE_SUFFIXES) or "?d=" in v), None
    )
    if value is None:
        return None
    if "/local-files/" in value and (local := parse_qs(urlsplit(value).query).get("d")):
        return local[0]
    if not value.startswith("/data/upload/") and not value.startswith("upload/"):
        return value
    own = value.rpartition("/")[2]
    short = _UPLOAD.sub("", own, count=1) if _UPLOAD.match(own) else own
    return own if finder.exists(own) else short


def _results(entry: Mapping[str, Any], found: ConvertedFolder, name: str) -> list[list[Mapping[str, Any]]]:
    """Return the results of each annotation of a task that was not cancelled."""
    if not isinstance(entry.get("annotations"), list):
        return [_results_of_min(entry, found, name)]
    done = [each for each in entry["annotations"] if isinstance(each, Mapping) and not each.get("was_cancelled")]
    if len(entry["annotations"]) > len(done):
        found.left_out.add("annotations that were cancelled", name, len(entry["annotations"]) - len(done))
    return [
        [r for r in each["result"] if isinstance(r, Mapping)] for each in done if isinstance(each.get("result"), list)
    ]


def _results_of_min(entry: Mapping[str, Any], found: ConvertedFolder, name: str) -> list[Mapping[str, Any]]:
    """Return the results of a task of JSON_MIN, which has them beside the image, by the name of the control."""
    results: list[Mapping[str, Any]] = []
    for key, value in entry.items():
        role = role_of(str(key))
        if key in _OTHERS_OF_MIN or role in ("image", "question") or value in (None, "", [], {}):
            continue
        read = _read_min(key, value, "textarea" if role == "caption" else "choices")
        if not read:
            found.left_out.add(f"values of {key} that are not read; export JSON instead of JSON_MIN", name)
        results += read
    return results


def _read_min(key: str, value: Any, kind: str) -> list[Mapping[str, Any]]:
    """Return the results in one value of JSON_MIN; `kind` is that of a bare text."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        return [{"from_name": key, "type": _shape_in(each), "value": each} for each in value]
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return [{"from_name": key, "type": kind, "value": {"choices": value, "text": value}}]
    named = {"choices": "choices", "text": "textarea", "rating": "rating", "number": "number"}
    if isinstance(value, Mapping) and (given := next((each for each in named if each in value), None)):
        return [{"from_name": key, "type": named[given], "value": value}]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [{"from_name": key, "type": "number", "value": {"number": value}}]
    return []


def _shape_in(value: Mapping[str, Any]) -> str:
    return next((str(kind) for kind in value if _OTHER_SHAPES.fullmatch(str(kind))), "")


def _read_result(task: _Task, result: Mapping[str, Any], is_first: bool, found: ConvertedFolder) -> None:
    kind, value = result.get("type"), result.get("value")
    control = str(result.get("from_name", kind))
    if isinstance(value, Mapping) and kind in _ABOUT_IMAGE:
        if value.keys() & {"x", "points"}:
            found.left_out.add(f"results of type {kind} about a part of an image, which are not read", task.name)
            return
        given = value.get(_ABOUT_IMAGE[kind])
        texts = [str(each).strip() for each in (given if isinstance(given, list) else [given]) if each is not None]
        text = " ".join(texts) if kind == "textarea" else ", ".join(map(class_text, texts))
        answers = task.texts if kind == "textarea" else task.choices
        answers.setdefault(control, Counter()).update([text] if text else [])
    elif kind in _SHAPES and isinstance(value, Mapping) and _labels(value.get(str(kind))):
        if is_first:
            for label in _labels(value[str(kind)]):
                task.boxes.append(ObjectBox(class_text(label), *_center(str(kind), value)))
        else:
            found.left_out.add("boxes of a second annotator", task.name)
    else:
        task.has_others = task.has_others or _OTHER_SHAPES.fullmatch(str(kind)) is not None
        found.left_out.add(f"results of type {kind or 'unknown'}, which are not read", task.name)


def _labels(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str) and each.strip()] if isinstance(value, list) else []


def _center(kind: str, value: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return the centre as shares of the image's size; Label Studio gives percent."""
    try:
        if kind == "polygonlabels":
            points = [(float(x), float(y)) for x, y in value["points"]]
            return sum(x for x, _ in points) / len(points) / 100, sum(y for _, y in points) / len(points) / 100
        half = 0.0 if kind == "ellipselabels" else 0.5
        x, y = (float(value[at]) + half * float(value.get(size, 0)) for at, size in (("x", "width"), ("y", "height")))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None, None
    return x / 100, y / 100


def _agreed(answers: Counter[str], task: _Task, found: ConvertedFolder) -> str | None:
    """Return the answer that most annotators gave; None if two are as frequent."""
    ranked = answers.most_common(2)
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        found.left_out.add("answers on which annotators disagree", f"{task.name}: {ranked[0][0]} / {ranked[1][0]}")
        return None
    return ranked[0][0] if ranked else None


def _add_choices(found: ConvertedFolder, tasks: Sequence[_Task], options: FolderOptions) -> None:
    controls = dict.fromkeys(control for task in tasks for control in task.choices)
    for control in controls:
        agreed = [(task, _agreed(task.choices[control], task, found)) for task in tasks if control in task.choices]
        rows = [(task, answer) for task, answer in agreed if answer]
        classes = {part for _, answer in rows for part in answer.split(", ")}
        if not rows or is_only_class((answer for _, answer in rows), f"choices of {control}", found.left_out):
            continue
        default = class_question(classes)
        if all(map(_is_number, classes)):
            default = f"What is the {class_text(control)} of the image? Answer with a number."
        if len(controls) > 1:
            default = f"{class_text(control)}: {default}"
        question = ask_question(options, default) if len(controls) == 1 else default
        for task, answer in rows:
            row_id = f"{task.name} {control}"
            found.add(
                task.split,
                {"id": row_id, "image": task.image, "question": task.asked or question, "answer": answer},
            )
        found.facts.append((f"choices {control}", counted(Counter(answer for _, answer in rows))))
        found.facts.append((f"question {control}", "the task's own" if rows[0][0].asked else question))


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


def _add_texts(found: ConvertedFolder, tasks: Sequence[_Task], options: FolderOptions) -> None:
    for control in dict.fromkeys(control for task in tasks for control in task.texts):
        is_caption = role_of(control) in ("caption", "answer")
        default = _DESCRIBE if is_caption else f"What is the {class_text(control)} of the image?"
        options.used.add("question")
        question = options.question or default
        count = own = 0
        for task in tasks:
            answer = _agreed(task.texts[control], task, found) if control in task.texts else None
            if answer:
                count, own = count + 1, own + bool(task.asked)
                row = {"id": f"{task.name} {control}", "image": task.image, "question": task.asked or question}
                found.add(task.split, row | {"answer": answer})
        if count:
            asked = "to each task's own question" if own == count else f"each the answer to: {question}"
            found.facts.append((f"texts {control}", f"{count:,}, {asked}"))
