"""Sources of rows: a file, a folder or a Hub data set, with their images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from lora_llava.core.errors import UserError
from lora_llava.core.hub_errors import hub_problem
from lora_llava.core.storage import file_hash, looked_in
from lora_llava.data.conversation import Conversation, ImagePosition
from lora_llava.data.files.row_files import (
    data_files,
    empty_rows,
    estimate_rows,
    parquet_columns,
    placed_rows,
)
from lora_llava.data.files.shards import SUFFIXES, set_stem, shard_of
from lora_llava.data.files.text_encoding import foreign_encoding
from lora_llava.data.formats import Columns, Format, RowError, missing_columns, read_row
from lora_llava.data.images.image_sources import FolderImages, ImageSource, TableImages
from lora_llava.data.images.image_tables import open_table
from lora_llava.data.images.to_rgb import Background

_MOST_SHARDS = 10_000
Read = Conversation | RowError
"""A row that was read, or the error that prevented it."""


class _ImageSettings(TypedDict):
    """Settings with which images are opened."""

    background: Background
    follow_links: bool


@dataclass(frozen=True)
class Source:
    """A source of rows and their images.

    Attributes:
        name: Its name in reports.
        images: Opens its images.
        fingerprint: Hash of everything that determines what `read` yields.
        read: Yields every row in order, as a conversation or an error.
        files: The files it is read from, if any: one, or the shards of a set.
        rows: The number of rows, if known.
    """

    name: str
    images: ImageSource
    fingerprint: str
    read: Callable[[], Iterator[Read]]
    files: tuple[Path, ...] = ()
    rows: int | None = None

    @property
    def file(self) -> Path | None:
        """The first file it is read from; None if there are no files."""
        return self.files[0] if self.files else None

    def remarks(self) -> list[tuple[str, str]]:
        """Return remarks on how the files are read; see `file_remarks`."""
        return file_remarks(self.files)

    def expected(self) -> int | None:
        """Estimate the number of rows, for a progress bar; None if that is not possible."""
        if self.rows is not None or not self.files:
            return self.rows
        try:
            return sum(map(estimate_rows, self.files))
        except UserError:  # reported when the rows are read
            return None

    def pick(self, numbers: Iterable[int]) -> list[Conversation]:
        """Return the conversations with these row numbers, in this order.

        Raises:
            UserError: If a row is not a conversation or does not exist any more.
        """
        wanted = list(numbers)
        found: dict[int, Conversation] = {}
        missing = set(wanted)
        rows = self.read() if missing else iter(())
        for number, row in enumerate(rows):
            if number in missing and isinstance(row, Conversation):
                found[number] = row
                missing.discard(number)
                if not missing:
                    break
        if missing:
            raise UserError(
                f"{self.name}: row number {min(missing)} does not exist any more; the data has changed, start a new run"
            )
        return [found[number] for number in wanted]


def file_remarks(files: Sequence[Path]) -> list[tuple[str, str]]:
    """Return remarks on how files of rows are read, on encodings and empty rows, as pairs of kind and message."""
    found = []
    for file in files:
        if file.suffix.lower() == ".parquet":
            continue
        encoding = foreign_encoding(file)
        if encoding is not None:
            found.append(("encoding", f"{file.name}: read as {encoding}; save it as UTF-8 if letters look wrong"))
        empty = empty_rows(file)
        if empty:
            rows = "1 empty row is" if empty == 1 else f"{empty:,} empty rows are"
            found.append(("empty rows", f"{file.name}: {rows} left out"))
    return found


def list_source(name: str, rows: Sequence[Conversation], images: ImageSource) -> Source:
    """Return a source of conversations in memory."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.row_id, row.turns, row.images, row.extra)).encode("utf-8", "surrogatepass"))
    return Source(name, images, digest.hexdigest(), lambda: iter(rows), rows=len(rows))


def open_source(
    path: str | Path,
    *,
    name: str | None = None,
    form: Format = "conversations",
    file: str | None = None,
    revision: str | None = None,
    split: str = "train",
    image_folder: str | Path | None = None,
    columns: Columns | None = None,
    position: ImagePosition = "first",
    seed: int = 0,
    max_image_pixels: int = 50_000_000,
    where: str = "data.path",
    background: Background = "white",
    follow_links: bool = False,
) -> Source:
    """Open a file of rows, a folder with one, or a data set on the Hub.

    Args:
        path: A file (JSON, JSONL, CSV, TSV, Parquet), one of several shards, a folder with such a file or set, or a Hub
            id.
        name: The name in reports; default: the file's name.
        form: The value of `data.format`: `conversations` or `captions`.
        file: A file in a Hub data set's repository, such as `detail_23k.json`; None loads it as a table.
        revision: Branch, tag or commit of a Hub id.
        split: Split of a Hub table, or of a folder with files of several splits.
        image_folder: Root folder of the images; default: `images` beside the file, or else the file's folder.
        columns: The names of the table's columns.
        position: See `read_row`.
        seed: See `read_row`.
        max_image_pixels: Most pixels of an image.
        where: The recipe field of the path, for messages.
        background: See `to_rgb`.
        follow_links: Whether links may lead out of the image folder.

    Returns:
        The source; its rows are not read yet.

    Raises:
        UserError: If the path is missing or of an unknown kind, or a Parquet file lacks the columns.
    """
    columns = columns or Columns()
    image_settings: _ImageSettings = {"background": background, "follow_links": follow_links}
    settings = [form, asdict(columns), position, seed]
    on_disk = Path(path)
    if file is not None:
        on_disk = on_disk / file if on_disk.is_dir() else _download(str(path), file, revision, where)
    elif not on_disk.exists() and _is_hub_id(str(path)):
        table = open_table(str(path), split, revision, where)
        fingerprint = _hash([table._fingerprint, settings])
        images = _images_of(
            image_folder, max_image_pixels, table, columns, Path(), table._fingerprint, where, image_settings
        )
        return Source(
            name or str(path),
            images,
            fingerprint,
            lambda: _read(_table_rows(table), form, columns, position, seed, isinstance(images, TableImages)),
        )
    found = data_files(path if file is None else on_disk, where, split)
    embedded = _embedded_images(found, form, columns, where)
    digests = [file_hash(each) for each in found]
    digest = digests[0] if len(digests) == 1 else _hash(digests)
    images = _images_of(
        image_folder, max_image_pixels, embedded, columns, found[0].parent, digest, where, image_settings
    )
    return Source(
        name or set_stem(found[0]),
        images,
        _hash([digest, found[0].suffix.lower(), settings]),
        lambda: _read(_file_rows(found), form, columns, position, seed, isinstance(images, TableImages)),
        found,
    )


def _embedded_images(files: Sequence[Path], form: Format, columns: Columns, where: str) -> Any:
    """Open Parquet files that hold the images themselves as a table; None for other files.

    Raises:
        UserError: If a file lacks the columns.
    """
    if files[0].suffix.lower() != ".parquet":
        return None
    schemas = [parquet_columns(file) for file in files]
    for file, kinds in zip(files, schemas, strict=True):
        check_columns(file, list(kinds), form, columns)
    if any(kinds.get(columns.image) or kinds.get("images") for kinds in schemas):
        return open_table(str(files[0]), "train", None, where, files)
    return None


def _file_rows(files: Iterable[Path]) -> Iterator[tuple[str, Any]]:
    """Yield the rows of files in order, each with its file and place."""
    for file in files:
        for place, row in placed_rows(file):
            yield f"{file.name}, {place}", row


def _table_rows(table: Any) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(_light_rows(table)):
        yield f"index {number}", row


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and Path(path).suffix.lower() not in SUFFIXES


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(
    rows: Iterable[tuple[str, Any]], form: Format, columns: Columns, position: ImagePosition, seed: int, embedded: bool
) -> Iterator[Read]:
    for number, (place, row) in enumerate(rows):
        own = _own_id(row, columns)
        row_id = str(number) if own is None else own
        named = place if own is None else f"row {own:.80} ({place})"
        try:
            found = read_row(row, number, form=form, columns=columns, position=position, seed=seed, embedded=embedded)
        except RowError as error:
            error.row_id, error.name = row_id, named
            yield error
        else:
            yield replace(found, row_id=row_id, named=named)


def _own_id(row: Any, columns: Columns) -> str | None:
    """Return a row's id; None if it has none, or an empty cell."""
    value = row.get(columns.id) if isinstance(row, dict) else None
    if value is None or value != value or str(value).strip() == "":  # NaN != NaN
        return None
    return str(value)


def _images_of(
    folder: str | Path | None,
    max_pixels: int,
    table: Any,
    columns: Columns,
    beside: Path,
    fingerprint: str,
    where: str,
    image_settings: _ImageSettings,
) -> ImageSource:
    """Return the images of a folder, or of the table if it holds them."""
    if folder is None and table is not None:
        column = next((name for name in (columns.image, "images") if name in table.column_names), None)
        if column is not None and not _is_text(table.features[column]):
            return TableImages(table, max_pixels, column, fingerprint, image_settings["background"])
    root = Path(folder) if folder is not None else beside / "images"
    if folder is None and not root.is_dir():
        root = beside
    if folder is not None and not root.is_dir():
        field = f"{where.rpartition('.')[0]}.image_folder"
        raise UserError(
            f"{field}: the folder {folder} does not exist{looked_in(folder)}; name the root folder of the images"
        )
    return FolderImages(root, max_pixels, **image_settings)


def check_columns(file: Path, found: Sequence[str], form: Format, columns: Columns) -> None:
    """Check that a table has the columns that its rows need.

    Raises:
        UserError: If it lacks some; the message lists those it has.
    """
    lacking = missing_columns(dict.fromkeys(found), form, columns)
    if lacking is not None:
        raise UserError(f"{file}: it lacks {lacking}; it has {', '.join(found)}; name its columns with data.columns")


def _light_rows(table: Any) -> Iterator[Any]:
    """Yield the rows of a `datasets` table without the bytes of their images."""
    import pyarrow

    for batch in table.with_format("arrow").iter(1000):
        rows = batch.select([name for name in batch.column_names if not _is_image(table.features[name])]).to_pylist()
        for name in (name for name in batch.column_names if _is_image(table.features[name])):
            for row, value in zip(rows, batch.column(name), strict=True):
                several = isinstance(value, (pyarrow.ListScalar, pyarrow.LargeListScalar))
                count = len(value) if several and value.is_valid else int(value.is_valid)
                row[name] = [{"path": None}] * count
        yield from rows


def _is_image(feature: Any) -> bool:
    import datasets

    return isinstance(getattr(feature, "feature", feature), datasets.Image)


def _is_text(feature: Any) -> bool:
    return "string" in str(getattr(getattr(feature, "feature", feature), "dtype", ""))


def _download(repo: str, file: str, revision: str | None, where: str) -> Path:
    """Download a file of a Hub data set; for a shard, the complete set."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    shard = shard_of(file)
    names = [file]
    if shard is not None and shard.total <= _MOST_SHARDS and not shard.hash:
        first = 1 if shard.index == shard.total else 0
        names = [file, *(str(Path(file).with_name(shard.name(i))) for i in range(first, first + shard.total))]
    try:
        found = [hf_hub_download(repo, each, repo_type="dataset", revision=revision) for each in dict.fromkeys(names)]
        return Path(found[0])
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise UserError(
            f"{where}: {file} of {repo} cannot be downloaded from the Hub: {hub_problem(error, repo, dataset=True)}; "
            "or name a local file"
        ) from None
