"""`lora-llava init`: write and check a recipe for a folder of images and questions."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from ruamel.yaml.comments import CommentedMap

from lora_llava.core.errors import UserError
from lora_llava.core.storage import atomic_file
from lora_llava.data.checks.findings import CheckReport
from lora_llava.data.folder import understand_folder
from lora_llava.data.folder_data import FolderData
from lora_llava.data.folder_kinds.folder_kind import FolderOptions, number_of
from lora_llava.data.formats import Columns
from lora_llava.demo.dataset import EXAMPLE_IMAGES, write_example_folder
from lora_llava.model.families.llava_kinds import TILED
from lora_llava.model.weights.parts import load_config
from lora_llava.prepare.folder_report import print_found
from lora_llava.prepare.folder_rows import write_rows
from lora_llava.prepare.recipe_text import dump_text, load_text
from lora_llava.prepare.recipe_update import data_part, read_record, update_recipe, write_record
from lora_llava.prepare.row_check import check
from lora_llava.recipe import find_recipe, load_recipe

RECIPE_NAME = "recipe.yaml"
_SHARE = 10
"""One in this many rows is held out for validation; with fewer than `_FEW` rows, one in five."""
_FEW = 200
_MOST = 1_000
CLIP = "openai/clip-vit-large-patch14-336"
"""LLaVA-1.5's vision tower."""
_LLAVA_1_5, _LLAVA_1_6 = "llava-hf/llava-1.5-", "llava-hf/llava-v1.6-"


@dataclass(frozen=True)
class InitChoice:
    """What a person chose for a new recipe.

    Attributes:
        data: The file of rows; None if the folder has only one.
        model: A complete LLaVA to start from: a folder, a Hub id or `demo`; None keeps the template's.
        llm: A language model to assemble a new LLaVA from, with `vision_tower`; None starts from a complete LLaVA.
        vision_tower: A vision tower; None with `llm` is CLIP ViT-L/14-336.
        template: The shipped recipe to fill in; None for my_data_qlora.yaml, for a LLaVA-1.6
            my_data_highres_qlora.yaml, or the demo's.
        example: Create the folder first, with drawn images and a table of questions.
        follow_links: Follow symbolic links, also to images outside the folder; the recipe records it.
        options: How the folder is understood.
        update: Refresh the data part of the recipe that an earlier call wrote.
        dry_run: Print what was understood, and write nothing.
    """

    data: Path | None = None
    model: str | None = None
    llm: str | None = None
    vision_tower: str | None = None
    template: str | None = None
    example: bool = False
    follow_links: bool = False
    options: FolderOptions = field(default_factory=FolderOptions)
    update: bool = False
    dry_run: bool = False


def init(folder: Path, *, console: Console, **chosen: Any) -> tuple[Path, CheckReport]:
    """Write a recipe for a folder, and check it.

    Args:
        folder: The folder with images and a file of rows or labels, or with class folders.
        console: Prints what was found.
        chosen: The attributes of `InitChoice`.

    Returns:
        The recipe's file, and the report of the check; an empty report for a dry run.

    Raises:
        UserError: For a folder that cannot be read as data, or that has a recipe already.
    """
    choice = InitChoice(**chosen)
    target = folder / RECIPE_NAME
    if choice.example and choice.dry_run:
        raise UserError("--example writes the folder, and --dry-run writes nothing; leave one out")
    _refuse(choice, target)
    if choice.example:
        write_example_folder(folder)
        console.print(f"{folder}: {EXAMPLE_IMAGES} drawn images and questions.csv", soft_wrap=True)
    if target.exists() and not choice.update and not choice.dry_run:
        raise UserError(
            f"{target} exists already; add --update to refresh its data part and keep your changes, run `lora-llava "
            f"check {target}`, or remove it to start again"
        )
    choice = _with_recorded(choice, target, console)
    found = understand_folder(folder, choice.data, choice.follow_links, choice.options)
    print_found(found, _validation_in_words(found), console)
    if choice.dry_run:
        console.print("nothing was written; leave out --dry-run to write the recipe")
        return target, CheckReport()
    write_rows(found, console)
    _write_recipe(target, found, choice, console)
    if choice.llm:
        same = "llm, vision_tower and high_resolution" if "high_resolution" in target.read_text() else "llm and tower"
        console.print(
            "its projector is untrained: few rows teach it little; train it on captions first (Stage 1, "
            f"recipes/align.yaml with the same {same}) and set model.start_from.stage1_run",
            soft_wrap=True,
        )
    try:
        report = check(load_recipe(target), console=console)
    except UserError as error:
        raise UserError(f"{target} was written but not checked: {error}") from None
    _print_next(target, report, console)
    return target, report


def _print_next(target: Path, report: CheckReport, console: Console) -> None:
    console.print("next:")
    fixable = bool(report.errors) and all(finding.number >= 0 for finding in report.errors)
    verbs = [("check", " --fix" if fixable else "")] if report.errors else [("preview", ""), ("finetune", "")]
    for verb, flags in verbs:
        console.print(f"  lora-llava {verb} {shlex.quote(str(target))}{flags}", soft_wrap=True)


def _refuse(choice: InitChoice, target: Path) -> None:
    """Refuse choices that contradict each other."""
    if choice.model == "demo" and choice.template is not None:
        raise UserError(f"--recipe {choice.template}: the demo uses its own recipe; leave out --recipe or --model demo")
    if (choice.llm or choice.vision_tower) and choice.model is not None:
        raise UserError(
            f"--llm and --vision-tower assemble a new LLaVA, and --model {choice.model} is a complete one; drop one"
        )
    if choice.vision_tower and not choice.llm:
        raise UserError("--vision-tower needs --llm: the two make a new LLaVA; name the language model")
    if choice.template is not None:
        find_recipe(choice.template)  # before any row is written
    if choice.update and target.exists() and (choice.model or choice.llm or choice.template):
        raise UserError(
            f"--update refreshes the data part of {target} only; leave out --model, --llm and --recipe, and change its "
            "model section by hand"
        )


def _with_recorded(choice: InitChoice, target: Path, console: Console) -> InitChoice:
    """Return the choice with what the call that wrote the recipe was given, for an update."""
    if not choice.update:
        return choice
    if not target.exists():
        console.print(f"{target} does not exist yet; a new one is written", soft_wrap=True)
        return choice
    before = read_record(target)["options"]
    options = choice.options
    given: dict[str, Any] = {key: getattr(options, key) or before.get(key) for key in _RECORDED}
    given["ask"] = tuple(given["ask"] or ())
    given["columns"] = dict(given["columns"] or {})
    given["class_folders"] = bool(given["class_folders"])
    same = [f"--{key.replace('_', '-')}" for key in _RECORDED if before.get(key) and not getattr(options, key)]
    if same:
        console.print(f"as before: {', '.join(same)}", soft_wrap=True)
    data = choice.data or (Path(before["data"]) if before.get("data") else None)
    links = choice.follow_links or bool(before.get("follow_links"))
    return replace(choice, options=replace(options, **given), data=data, follow_links=links)


_RECORDED = ("columns", "sheet", "question", "label_is", "ask", "class_folders")
"""Options of an earlier call that an update uses again."""


def _write_recipe(target: Path, found: FolderData, choice: InitChoice, console: Console) -> None:
    """Write a new recipe, or update the one that exists, and record what was written."""
    shipped = choice.template or _default_template(choice.model)
    parts = {"llm": choice.llm, "vision_tower": choice.vision_tower or CLIP} if choice.llm else None
    filled = fill_in(find_recipe(shipped), found, choice.model, choice.follow_links, parts)
    fresh = data_part(filled, str(target))
    updated = choice.update and target.exists()
    with_changes = update_recipe(target, fresh, console) if updated else filled
    with atomic_file(target) as temporary:
        temporary.write_text(with_changes, encoding="utf-8")
    options = {key: getattr(choice.options, key) for key in _RECORDED}
    options |= {"data": str(choice.data) if choice.data else None, "follow_links": choice.follow_links}
    write_record(target, fresh, options)
    console.print(f"{'updated' if updated else 'wrote'} {target}", soft_wrap=True)


def _default_template(model: str | None) -> str:
    """Return the shipped recipe to fill in for a complete LLaVA, or for the recipe's own (None)."""
    if model == "demo":
        return "demo_my_data_qlora.yaml"
    return "my_data_highres_qlora.yaml" if model is not None and _is_tiled(model) else "my_data_qlora.yaml"


def _is_tiled(model: str) -> bool:
    if model.startswith(_LLAVA_1_6):
        return True
    try:
        return bool(load_config(model, None, "start_from.llava").get("model_type") == TILED)
    except UserError:
        return False  # the check of the recipe names the reason


def _validation_in_words(found: FolderData) -> str:
    count = held_out_rows(found.rows, found.linked)
    if found.validation is not None:
        rows = number_of(found.split_rows.get("validation", 0), "row")
        return rows if found.converted else f"{rows} in {found.validation}"
    if not count:
        return "none: too few rows or images to hold any out"
    return f"at least {number_of(count, 'row')}, held out by image"


def held_out_rows(rows: int, images: int) -> int:
    """Return how many rows to hold out for validation; 0 if nothing would be left to train on.

    Args:
        rows: Number of rows.
        images: Number of different images, or sets of images; rows with the same one stay together.
    """
    if rows < 2 or images == 1:
        return 0
    return min(_MOST, max(1, rows // (5 if rows < _FEW else _SHARE)))


def fill_in(
    template: Path,
    found: FolderData,
    model: str | None,
    follow_links: bool = False,
    parts: dict[str, str] | None = None,
) -> str:
    """Fill a folder's data into a shipped recipe, and keep its comments.

    Args:
        template: A shipped recipe for own data.
        found: The folder's data.
        model: A complete LLaVA to start from, or `demo`; None keeps the template's.
        follow_links: Whether to follow symbolic links.
        parts: `llm` and `vision_tower` of a new LLaVA, instead of a complete one.

    Returns:
        The recipe's text.
    """
    content = load_text(template.read_text(encoding="utf-8"))
    content["output_dir"] = f"runs/{_folder_name(found)}"
    data = content["data"]
    data["format"] = found.form
    data["path"] = str(found.file)
    if found.image_folder is None:
        data.pop("image_folder", None)
    else:
        data["image_folder"] = str(found.image_folder)
    if follow_links:
        data["follow_links"] = True
    data["validation_rows"] = 0 if found.validation else held_out_rows(found.rows, found.linked)
    _put(data, "columns", _changed_columns(found.columns), "column names of the table")
    for part in ("validation", "test"):
        file = getattr(found, part)
        if file is not None:
            _put(data, f"{part}_source", _held_out_source(found, file), "never trained on")
    if found.form == "captions" or not (data["validation_rows"] or found.validation or found.test):
        content.pop("evaluation", None)  # no rows to evaluate on
    if model is not None and model != "demo":
        content["model"]["start_from"] = {"llava": model}
    if parts:
        shipped = content["model"]
        tiled = str(shipped["start_from"].get("llava")).startswith(_LLAVA_1_6)
        high: dict[str, Any] = {"high_resolution": {}} if tiled else {}
        high |= {key: shipped[key] for key in ("high_resolution", "max_tiles") if key in shipped}
        start = {"start_from": {"untrained": True}, "quantization": "nf4"}
        content["model"] = {**parts, **high, **start}
    if parts or (model is not None and model != "demo" and not model.startswith(_LLAVA_1_5)):
        data["template"] = "auto"  # the shipped recipe names that of its own model
        data.pop("image_aspect", None)
    return dump_text(content)


def _folder_name(found: FolderData) -> str:
    parent = found.file.parent.resolve()
    return parent.parent.name if found.converted is not None else parent.name


def _put(section: Any, key: str, value: dict[str, Any], comment: str) -> None:
    """Insert a key at the start of a section; the last key carries the comments before the next section."""
    if value:
        in_one_line = CommentedMap(value)
        in_one_line.fa.set_flow_style()
        section.insert(1, key, in_one_line, comment=comment)


def _changed_columns(columns: Columns) -> dict[str, str]:
    usual = vars(Columns())
    return {role: name for role, name in vars(columns).items() if name != usual[role]}


def _held_out_source(found: FolderData, file: Path) -> dict[str, Any]:
    source: dict[str, Any] = {"format": found.form, "path": str(file)}
    if found.image_folder is not None:
        source["image_folder"] = str(found.image_folder)
    changed = _changed_columns(found.columns)
    return source | ({"columns": changed} if changed else {})
