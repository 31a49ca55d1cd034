"""All rows of a file or folder, to be evaluated or inspected in place of a recipe's rows."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.core.storage import file_hash
from lora_llava.data.files.row_files import data_files, parquet_columns, placed_rows
from lora_llava.data.folder_kinds.folder_kind import FolderOptions
from lora_llava.data.formats import Columns, Format, RowError, missing_columns, read_row
from lora_llava.data.images.image_id import own_names
from lora_llava.data.table_shape import table_shape
from lora_llava.recipe import Recipe
from lora_llava.recipe.io import check_recipe

_PEEK = 50
"""Rows from which format, columns and image folder are detected."""
_SCIENCEQA = "problems.json"
_KEPT = (
    "template",
    "system_prompt",
    "image_position",
    "image_aspect",
    "max_image_pixels",
    "background",
    "follow_links",
    "on_bad_row",
    "on_bad_image",
)
"""Keys of `data` that hold for any rows."""


@dataclass(frozen=True)
class DataFile:
    """Rows to evaluate.

    Attributes:
        path: A file of rows in any format that training reads, a folder with one, or a ScienceQA folder.
        image_folder: Root folder of the images; None finds it: `images` beside the file, the file's folder, or the
            folder of the recipe's images, whichever has most of the first images.
    """

    path: Path
    image_folder: Path | None = None

    @property
    def folder(self) -> Path:
        """The path, absolute, with `~` expanded; the folder of ScienceQA for its `problems.json`."""
        path = self.path.expanduser().absolute()
        return path.parent if path.name == _SCIENCEQA else path

    @property
    def is_scienceqa(self) -> bool:
        return (self.folder / _SCIENCEQA).is_file()

    def files(self) -> tuple[Path, ...]:
        """Return the files of rows.

        Raises:
            UserError: If there are none, or several that are not one set.
        """
        if self.is_scienceqa:
            return (self.folder / _SCIENCEQA,)
        return data_files(self.folder, "--data", "test")

    def digest(self) -> str:
        """Return the SHA-256 of the rows; of several files, that of their hashes."""
        digests = [file_hash(file) for file in self.files()]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def suffix(self) -> str:
        """Return a name for the files of the results: the file's name, and the first digits of its hash."""
        stem = self.folder.name if self.is_scienceqa else self.files()[0].stem
        plain = re.sub(r"[^\w.-]+", "_", stem)[:40]
        return f"{plain}_{self.digest()[:6]}"


def with_data_file(recipe: Recipe, data: DataFile) -> Recipe:
    """Return a recipe whose test rows are all rows of a file.

    Args:
        recipe: The recipe; its template, images' settings and, where the file has them, its columns are kept.
        data: The rows.

    Raises:
        UserError: If the file is missing or its rows have no known format.
    """
    content = recipe.model_dump(mode="json")
    content["training"]["early_stopping"] = None  # it needs validation rows, which the file has none of
    kept = {name: content["data"][name] for name in _KEPT}
    folder = str(data.image_folder.expanduser().absolute()) if data.image_folder else None
    if data.image_folder is not None and not data.image_folder.expanduser().is_dir():
        raise UserError(f"--image-folder: {data.image_folder} does not exist; name the root folder of the images")
    if data.is_scienceqa:
        own = content["data"] if recipe.data.format == "scienceqa" else {}
        order = {name: own[name] for name in ("prompt_order", "splits") if name in own}
        content["data"] = {"format": "scienceqa", "path": str(data.folder), "image_folder": folder, **kept, **order}
        return check_recipe(content, "--data")
    files = data.files()
    form, columns = _format_of(files, recipe)
    if folder is None:
        folder = _image_folder(files, form, columns, recipe)
    source = {"path": str(files[0]), "format": form, "columns": vars(columns), "image_folder": folder}
    content["data"] = {"format": "conversations", "path": str(files[0]), "test_source": source, **kept}
    if content["evaluation"] is not None:
        content["evaluation"] |= {"parser": "llava", "generate_every": None}
    return check_recipe(content, "--data")


def recipe_for(model: str, data: DataFile) -> Recipe:
    """Return a recipe with default settings that evaluates a complete LLaVA without a recipe on a file."""
    content: dict[str, Any] = {
        "stage": 2,
        "output_dir": ".",
        "model": {"start_from": {"llava": model}, "quantization": "none"},
        "lora": {},
        "data": {"format": "conversations", "path": str(data.folder)},
        "training": {"learning_rate": 1e-4},
    }
    return check_recipe(content, model)


def _format_of(files: Sequence[Path], recipe: Recipe) -> tuple[Format, Columns]:
    """Return format and columns of a file: the recipe's if it has them, else those that are detected."""
    first = _first_rows(files)
    if not first:
        raise UserError(f"--data: {files[0]} has no rows; add lines such as image, question, answer")
    known = [Columns(**source.columns.model_dump()) for source in recipe.data.all_sources()]
    row: dict[str, Any] = {key: value for each in first if isinstance(each, dict) for key, value in each.items()}
    forms: list[Format] = ["captions", "conversations"]
    forms = forms if recipe.data.format == "captions" else forms[1:]
    for form, columns in itertools.product(forms, [*known, Columns()]):
        if missing_columns(row, form, columns) is None:
            return form, columns
    shape = table_shape(files[0], first, FolderOptions(), files[0].parent)
    if shape.label_column is not None or shape.header is not None:
        raise UserError(
            f"--data: {files[0]} has class labels or no header row, so it has no questions; run `init` on "
            "its folder, and evaluate the train.jsonl or test.jsonl that it writes"
        )
    return shape.form, shape.columns


def _first_rows(files: Iterable[Path]) -> list[Any]:
    return [row for file in files for _, row in islice(placed_rows(file), _PEEK)][:_PEEK]


def _image_folder(files: Sequence[Path], form: Format, columns: Columns, recipe: Recipe) -> str | None:
    """Return the folder that has most images of the first rows; None if no row names one, or the table holds them."""
    if files[0].suffix.lower() == ".parquet":
        held = parquet_columns(files[0])
        if held.get(columns.image) or held.get("images"):
            return None
    names: list[str] = []
    for number, row in enumerate(_first_rows(files)):
        try:
            names += own_names(read_row(row, number, form=form, columns=columns).images)
        except RowError:  # reported when all rows are read
            continue
    beside = files[0].parent
    roots = [beside / "images", beside]
    for source in recipe.data.all_sources():
        path = Path(source.path)
        roots += [Path(source.image_folder)] if source.image_folder else [path.parent / "images", path.parent]
    found = [root for root in dict.fromkeys(roots) if root.is_dir()]
    if not names or not found:
        return None
    return str(max(found, key=lambda root: sum(_is_in(root, name) for name in names)))


def _is_in(root: Path, name: str) -> bool:
    try:
        return (root / name).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False
