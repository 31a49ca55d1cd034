"""Encoded rows in compact tables, cached on disk and memory-mapped, so that a second run does not tokenise them again.

A table has a source's rows with one id per image and nothing cut. The number of tokens of an image, the length limit
and the selection of rows are applied when rows are taken from it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_llava import __version__
from lora_llava.core.storage import UNWRITABLE, make_entry
from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation, EncodingError
from lora_llava.data.encode import IGNORE_INDEX, encode_spans, expand, last_answer_start
from lora_llava.data.files.row_files import Counted
from lora_llava.data.formats import RowError
from lora_llava.data.images.image_id import ImageId, ImageName, own_names
from lora_llava.data.images.tiling import TiledImages
from lora_llava.data.sources import Read, Source
from lora_llava.data.templates.named_templates import get_template
from lora_llava.data.templates.spans import AnyTemplate, Span, check_tokenizer, conversation_spans, fit_template
from lora_llava.data.typed import special_tokens

_VERSION = 4
"""Increase it when reading or encoding changes for the same rows."""
_BATCH = 512
_ARRAYS: dict[str, type] = {
    "ids": np.int32,
    "trained": np.bool_,
    "starts": np.int64,
    "image_counts": np.int32,
    "supervised": np.int32,
}
_TEXTS = ("row_ids", "images", "problems", "notes", "names")


class _Texts:
    """Many short texts as one array of bytes and their start offsets."""

    def __init__(self, content: np.ndarray, starts: np.ndarray) -> None:
        self.content, self.starts = content, starts

    def __getitem__(self, index: int) -> str:
        return self.content[self.starts[index] : self.starts[index + 1]].tobytes().decode("utf-8", "surrogatepass")

    def where(self) -> np.ndarray:
        """Return the indices of the texts that are not empty."""
        return np.flatnonzero(np.diff(self.starts))


class EncodedTable:
    """The encoded rows of a source.

    Attributes:
        ids: The concatenated ids of all rows, int32; one `<image>` per image.
        trained: Which ids are trained, bool.
        starts: The start of each row, int64 of shape (rows + 1,); a row that could not be encoded has no ids.
        image_counts: Number of images of each row.
        supervised: Trained tokens of each row.
        row_ids: The id of each row.
        problems: The error of each row, its kind and message separated by a tab; empty if it has none.
        notes: The repairs made to each row, separated by NUL; empty if none.
        image_id: The id of `<image>`; None before `with_image_tokens`.
        tiled: The images with their tiles; None for a model without tiles.
    """

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self.columns = columns
        self.image_id: int | None = None
        self.tiled: TiledImages | None = None
        self._image_tokens = np.zeros(0, dtype=np.int64)
        self.ids, self.trained, self.starts = columns["ids"], columns["trained"], columns["starts"]
        self.image_counts, self.supervised = columns["image_counts"], columns["supervised"]
        self.row_ids, self._images, self.problems, self.notes, self._names = (
            _Texts(columns[name], columns[f"{name}_starts"]) for name in _TEXTS
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def with_image_tokens(self, image_id: int, tokens: int | Mapping[str, int] | TiledImages) -> EncodedTable:
        """Return the table with the number of tokens of its images, which depends on the model.

        Args:
            image_id: The id of `<image>`.
            tokens: Tokens of an image; by its name if they differ, or by the tiles of the images.
        """
        found = EncodedTable(self.columns)
        found.image_id, found.tiled = image_id, tokens if isinstance(tokens, TiledImages) else None
        if isinstance(tokens, int):
            found._image_tokens = np.full(int(self.image_counts.sum()), tokens, dtype=np.int64)
            return found
        names = [name for row in range(len(self)) for name in self.images(row)]
        counts = tokens.tokens(names) if isinstance(tokens, TiledImages) else [tokens[name] for name in names]
        found._image_tokens = np.array(counts, dtype=np.int64)
        return found

    @functools.cached_property
    def _image_starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.image_counts, dtype=np.int64)])

    def image_tokens(self, index: int) -> np.ndarray:
        """Return the tokens of each of a row's images, int64."""
        return self._image_tokens[self._image_starts[index] : self._image_starts[index + 1]]

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row, including image tokens, int64."""
        total = np.concatenate([[0], np.cumsum(self._image_tokens)])
        return np.diff(self.starts) - self.image_counts + np.diff(total[self._image_starts])

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's ids and their trained mask."""
        place = slice(self.starts[index], self.starts[index + 1])
        return self.ids[place], self.trained[place]

    def images(self, index: int) -> list[str]:
        """Return the names of a row's images, in order."""
        text = self._images[index]
        return text.split("\0") if text else []

    def tile_counts(self, index: int) -> list[int]:
        """Return the tiles of each of a row's images: one for a model without tiles."""
        return [1] * int(self.image_counts[index]) if self.tiled is None else self.tiled.tiles(self.images(index))

    def row_name(self, index: int) -> str:
        """Return a row's name in messages; see `Conversation.named`."""
        return self._names[index]

    def problem(self, index: int) -> EncodingError | None:
        """Return the error of a row; None if it has none."""
        kind, _, message = self.problems[index].partition("\t")
        return EncodingError(message, kind) if kind else None


class _Writer:
    """Collects encoded rows in columns."""

    def __init__(self) -> None:
        self.columns = {name: array({"trained": "b"}.get(name, "i")) for name in _ARRAYS if name != "starts"}
        self.starts = array("q", [0])
        self.texts = {name: bytearray() for name in _TEXTS}
        self.text_starts = {name: array("q", [0]) for name in _TEXTS}

    def add(self, row: Read, encoded: tuple[np.ndarray, np.ndarray] | None, problem: EncodingError | None) -> None:
        if encoded is not None:
            self.columns["ids"].frombytes(encoded[0].tobytes())
            self.columns["trained"].frombytes(encoded[1].tobytes())
        self.columns["supervised"].append(int(encoded[1].sum()) if encoded is not None else 0)
        self.starts.append(len(self.columns["ids"]))
        images = own_names(row.images) if isinstance(row, Conversation) else ()
        self.columns["image_counts"].append(len(images))
        texts = {
            "row_ids": row.row_id,
            "images": "\0".join(images),
            "problems": f"{problem.kind}\t{problem}" if problem else "",
            "notes": "\0".join(row.notes) if isinstance(row, Conversation) else "",
            "names": row.name or f"row {row.row_id:.80}",
        }
        for name, text in texts.items():
            self.texts[name] += text.encode("utf-8", "surrogatepass")
            self.text_starts[name].append(len(self.texts[name]))

    def arrays(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {name: np.frombuffer(self.columns[name], _ARRAYS[name]) for name in self.columns}
        found["starts"] = np.frombuffer(self.starts, np.int64)
        for name in _TEXTS:
            found[name] = np.frombuffer(bytes(self.texts[name]), np.uint8)
            found[f"{name}_starts"] = np.frombuffer(self.text_starts[name], np.int64)
        return found


def encode_table(
    source: Source,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str | AnyTemplate,
    cache: Path | None = None,
    progress: Callable[[Iterable[Read]], Iterable[Read]] = lambda rows: rows,
) -> EncodedTable:
    """Encode a source once; the table is cached by the content and the settings.

    Args:
        source: The rows.
        tokenizer: See `encode_conversation`.
        template: See `encode_conversation`.
        cache: The cache folder; None keeps the table in memory.
        progress: Wraps the rows, for a progress bar; not called if the table is cached.

    Returns:
        The table, memory-mapped if it is cached.

    Raises:
        EncodingError: If the tokenizer does not fit the template.
        UserError: If a file cannot be read to its end.
    """
    template = get_template(template) if isinstance(template, str) else template
    check_tokenizer(tokenizer, template)
    template = fit_template(template, tokenizer)
    folder = cache / "encoded" / table_key(source, tokenizer, template) if cache is not None else None
    made: list[dict[str, np.ndarray]] = []

    def make() -> dict[str, np.ndarray]:
        writer = _Writer()
        with _all_cores():
            for batch in _batches(progress(_counted(source)), _BATCH):
                _encode_batch(batch, tokenizer, template, writer)
        made.append(writer.arrays())
        return made[0]

    if folder is None:
        return EncodedTable(make())
    try:
        make_entry(folder, lambda temporary: _write(make(), temporary))
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        return EncodedTable(made[0] if made else make())  # the cache is not writable
    return _load(folder)


def _counted(source: Source) -> Iterable[Read]:
    expected = source.expected()
    return source.read() if expected is None else Counted(source.read(), expected)


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizer use all cores, although processes that load images are forked later: the setting is read at
    every call (tokenizers, utils/parallelism.rs)."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


def table_key(source: Source, tokenizer: PreTrainedTokenizerBase, template: AnyTemplate) -> str:
    """Return the hash of everything that a table depends on."""
    files = [file.name for file in source.files]  # they are part of the rows' names
    ours = (__version__, _VERSION, source.fingerprint, files, repr(template))
    parts = (*ours, tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token_id)
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _batches(rows: Iterable[Read], size: int) -> Iterator[list[Read]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _encode_batch(
    batch: Sequence[Read], tokenizer: PreTrainedTokenizerBase, template: AnyTemplate, writer: _Writer
) -> None:
    specials = special_tokens(tokenizer)
    spans: list[list[Span] | EncodingError] = [_spans(row, template, specials) for row in batch]
    good = [found for found in spans if not isinstance(found, EncodingError)]
    encoded = iter(encode_spans(good, tokenizer))
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    for row, found in zip(batch, spans, strict=True):
        result = found if isinstance(found, EncodingError) else next(encoded)
        if not isinstance(result, EncodingError) and isinstance(row, Conversation):
            result = _check(result, row, image_id)
        if isinstance(result, EncodingError):
            writer.add(row, None, result)
        else:
            writer.add(row, result, None)


def _spans(row: Read, template: AnyTemplate, specials: Sequence[str]) -> list[Span] | EncodingError:
    if isinstance(row, RowError):
        return row
    try:
        return conversation_spans(row.turns, template, specials)
    except EncodingError as error:
        return error


def _check(
    encoded: tuple[np.ndarray, np.ndarray], row: Conversation, image_id: int
) -> tuple[np.ndarray, np.ndarray] | EncodingError:
    count = int((encoded[0] == image_id).sum())
    if count != len(row.images):
        return EncodingError(
            f"{count} {IMAGE_PLACEHOLDER} placeholders for {len(row.images)} images; make them equal",
            "placeholder count",
        )
    if not encoded[1].any():
        return EncodingError("the sample has no trained token; give it an answer", "no trained token")
    return encoded


def _write(arrays: dict[str, np.ndarray], folder: Path) -> None:
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    (folder / "table.json").write_text(json.dumps({name: len(values) for name, values in arrays.items()}))


def _load(folder: Path) -> EncodedTable:
    """Load the table of a folder whose files were checked."""
    sizes = json.loads((folder / "table.json").read_text())
    return EncodedTable(
        {name: np.load(folder / f"{name}.npy", mmap_mode="r" if sizes[name] else None) for name in sizes}
    )


class EncodedRows(Sequence[dict[str, Any]]):
    """The rows that a split uses, taken from one or more tables.

    Args:
        tables: The tables of the sources, with image tokens.
        places: The table and row of each row, int64 of shape (rows, 2).
        max_length: Most tokens of a row; the end of its last answer is cut to fit.
    """

    def __init__(self, tables: Sequence[EncodedTable], places: np.ndarray, *, max_length: int) -> None:
        self.tables, self.places, self.max_length = tables, places.reshape(-1, 2), max_length
        self.lengths = np.zeros(len(self.places), dtype=np.int64)
        """The number of tokens of each row."""
        self.supervised = np.zeros(len(self.places), dtype=np.int64)
        """The number of trained tokens of each row."""
        for number, table in enumerate(tables):
            mine = np.flatnonzero(self.places[:, 0] == number)
            rows = self.places[mine, 1]
            self.lengths[mine] = table.lengths()[rows]
            self.supervised[mine] = table.supervised[rows]
        for index in np.flatnonzero(self.lengths > max_length):
            self.supervised[index] = sum(label != IGNORE_INDEX for label in self[int(index)]["labels"])
        self.lengths = np.minimum(self.lengths, max_length)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        """Return a row with `row_id`, `input_ids`, `labels` and `image_files`, or the list of rows of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        table, row = self.table_row(index)
        encoded = expand(
            *table.row(row),
            image_id=table.image_id,
            num_image_tokens=table.image_tokens(row),
            max_length=self.max_length,
        )
        return {"row_id": table.row_ids[row], **encoded, "image_files": self.image_files(index)}

    def row_name(self, index: int) -> str:
        """Return a row's name in messages; see `Conversation.named`."""
        table, row = self.table_row(index)
        return table.row_name(row)

    def table_row(self, index: int) -> tuple[EncodedTable, int]:
        """Return the table that a row is from and its index there."""
        number, row = self.places[index]
        return self.tables[number], int(row)

    def image_files(self, index: int) -> list[ImageName]:
        """Return a row's images: their names with one table, an `ImageId` each with several."""
        table, row = self.table_row(index)
        number, names = int(self.places[index][0]), table.images(row)
        return list(names) if len(self.tables) == 1 else [ImageId(number, name) for name in names]

    def image_counts(self) -> np.ndarray:
        """Return the number of images of each row."""
        return np.array([self.tables[table].image_counts[row] for table, row in self.places], dtype=np.int64)

    def tile_counts(self) -> np.ndarray:
        """Return the tiles of all images of each row: their number for a model without tiles."""
        if all(table.tiled is None for table in self.tables):
            return self.image_counts()
        return np.array([sum(self.tables[table].tile_counts(int(row))) for table, row in self.places], dtype=np.int64)

    def take(self, indices: Sequence[int] | np.ndarray) -> EncodedRows:
        """Return only these rows."""
        places = self.places[np.asarray(indices, dtype=np.int64)]
        return EncodedRows(self.tables, places, max_length=self.max_length)


def answer_starts(table: EncodedTable, rows: np.ndarray) -> np.ndarray:
    """Return the start of the last answer of each of these rows, in tokens."""
    found = []
    for row in rows:
        ids, trained = table.row(int(row))
        start = last_answer_start(np.where(trained, ids, IGNORE_INDEX))
        images = int((ids[:start] == table.image_id).sum())
        found.append(start - images + int(table.image_tokens(int(row))[:images].sum()))
    return np.array(found, dtype=np.int64)
