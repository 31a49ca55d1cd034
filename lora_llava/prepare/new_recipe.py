"""`lora-llava init`: write and check a recipe for a folder of images and questions."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from lora_llava.core.errors import UserError
from lora_llava.data.checks.findings import CheckReport
from lora_llava.data.folder import FolderData, understand_folder
from lora_llava.data.formats import Columns
from lora_llava.data.sources import file_remarks
from lora_llava.demo.dataset import EXAMPLE_IMAGES, write_example_folder
from lora_llava.prepare.row_check import check
from lora_llava.recipe import find_recipe, load_recipe

RECIPE_NAME = "recipe.yaml"
_SHARE = 10
"""One in this many rows is held out for validation; with fewer than `_FEW` rows, one in five."""
_FEW = 200
_MOST = 1_000
CLIP = "openai/clip-vit-large-patch14-336"
"""LLaVA-1.5's vision tower."""
_LLAVA_1_5 = "llava-hf/llava-1.5-"


def init(
    folder: Path,
    *,
    data: Path | None = None,
    model: str | None = None,
    llm: str | None = None,
    vision_tower: str | None = None,
    template: str | None = None,
    example: bool = False,
    follow_links: bool = False,
    console: Console,
) -> tuple[Path, CheckReport]:
    """Write a recipe for a folder, and check it.

    Args:
        folder: The folder with images and a file of rows.
        data: The file of rows; None if the folder has only one.
        model: A complete LLaVA to start from: a folder, a Hub id or `demo`; None keeps the template's.
        llm: A language model to assemble a new LLaVA from, with `vision_tower`; None starts from a complete LLaVA.
        vision_tower: A vision tower; None with `llm` is CLIP ViT-L/14-336.
        template: The shipped recipe to fill in; None for my_data_qlora.yaml, or the demo's.
        example: Create the folder first, with drawn images and a table of questions.
        follow_links: Follow symbolic links, also to images outside the folder; the recipe records it.
        console: Prints what was found.

    Returns:
        The recipe's file, and the report of the check.

    Raises:
        UserError: For a folder that cannot be read as data, or that has a recipe already.
    """
    if model == "demo" and template is not None:
        raise UserError(f"--recipe {template}: the demo uses its own recipe; leave out --recipe or --model demo")
    if (llm or vision_tower) and model is not None:
        raise UserError(
            f"--llm and --vision-tower assemble a new LLaVA, and --model {model} is a complete one; drop one"
        )
    if vision_tower and not llm:
        raise UserError("--vision-tower needs --llm: the two make a new LLaVA; name the language model")
    if example:
        write_example_folder(folder)
        console.print(f"{folder}: {EXAMPLE_IMAGES} drawn images and questions.csv", soft_wrap=True)
    target = folder / RECIPE_NAME
    if target.exists():
        raise UserError(f"{target} exists already; run `lora-llava check {target}`, or remove it to start again")
    found = understand_folder(folder, data, follow_links)
    _print_found(found, console)
    shipped = "demo_my_data_qlora.yaml" if model == "demo" else template or "my_data_qlora.yaml"
    parts = {"llm": llm, "vision_tower": vision_tower or CLIP} if llm else None
    filled = fill_in(find_recipe(shipped), found, model, follow_links, parts)
    target.write_text(filled, encoding="utf-8")
    recipe = load_recipe(target)
    console.print(f"wrote {target}", soft_wrap=True)
    if parts:
        console.print(
            "its projector is untrained: few rows teach it little; train it on captions first (Stage 1, "
            "recipes/align.yaml with this llm and vision_tower) and set model.start_from.stage1_run",
            soft_wrap=True,
        )
    try:
        report = check(recipe, console=console)
    except UserError as error:
        raise UserError(f"{target} was written but not checked: {error}") from None
    console.print("next:")
    for verb in ("check",) if report.errors else ("preview", "finetune"):
        console.print(f"  lora-llava {verb} {shlex.quote(str(target))}", soft_wrap=True)
    return target, report


def _print_found(found: FolderData, console: Console) -> None:
    table = RichTable(title="Found data", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    facts = {
        "rows": f"{found.rows:,} in {found.file}" + _and_shards(found),
        "format": found.shape,
        "images": f"{found.named:,} named by rows, {found.images:,} in the folder",
        "image folder": str(found.image_folder or ("in the table" if found.embedded else "none: text only")),
        "read as": "; ".join(remark for _, remark in file_remarks(found.files)),
        "not used": ", ".join(found.unused),
        "validation": _validation_in_words(found),
        "test": str(found.test or ""),
    }
    for name, value in facts.items():
        if value:
            table.add_row(name, value)
    console.print(table)


def _and_shards(found: FolderData) -> str:
    return f" to {found.files[-1].name}, {len(found.files):,} files" if len(found.files) > 1 else ""


def _validation_in_words(found: FolderData) -> str:
    count = held_out_rows(found.rows, found.linked)
    if found.validation is not None:
        return str(found.validation)
    return f"{count:,} rows or more, held out by image" if count else "none: too few rows or images to hold any out"


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
    yaml = YAML()
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    content = yaml.load(template.read_text(encoding="utf-8"))
    content["output_dir"] = f"runs/{found.file.parent.resolve().name}"
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
        content["model"] = {**parts, "start_from": {"untrained": True}, "quantization": "nf4"}
    if parts or (model is not None and model != "demo" and not model.startswith(_LLAVA_1_5)):
        data["template"] = "auto"  # the shipped recipe names LLaVA-1.5's
        data.pop("image_aspect", None)
    stream = io.StringIO()
    yaml.dump(content, stream)
    return "\n".join(map(_comment_apart, stream.getvalue().splitlines())) + "\n"


def _comment_apart(line: str) -> str:
    """Put two spaces before a line's comment, which ruamel leaves in the column of the previous value."""
    value, sign, comment = line.rpartition("# ")
    return f"{value.rstrip()}  # {comment}" if sign and value.strip() else line


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
