"""Reading files of labels as other tools write them: JSON objects and lists, and XML without entities."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lora_llava.core.errors import UserError
from lora_llava.data.files.json_stream import JsonStream, first_line
from lora_llava.data.files.text_encoding import text_encoding

_LARGEST = 1 << 30
"""Most bytes of a file of labels; COCO's largest, instances_train2017.json, has 450 million."""


def json_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if the file holds anything else.

    Raises:
        UserError: If the file is too large.
    """
    facts = file.stat()
    return _json_object(file, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=4)
def _json_object(file: Path, changed: int, size: int) -> dict[str, Any]:
    if file.suffix.lower() != ".json" or _opening(file) != "{":
        return {}
    if size > _LARGEST:
        raise UserError(f"{file}: it has {size:,} bytes; split it into files of at most {_LARGEST:,} bytes")
    try:
        content = json.loads(file.read_text(encoding=text_encoding(file)))
    except (ValueError, RecursionError):  # reported where the file is read as a table
        return {}
    return content if isinstance(content, dict) else {}


def first_of_list(file: Path) -> Any:
    """Return the first element of the list in a JSON file; None if the file holds anything else."""
    if file.suffix.lower() != ".json" or _opening(file) != "[":
        return None
    try:
        return next(json_list(file), None)
    except UserError:  # reported where the file is read as a table
        return None


def json_list(file: Path) -> Iterator[Any]:
    """Yield the elements of the list in a JSON file, one at a time.

    Raises:
        UserError: Where the text is not JSON, as in a file that was cut short.
    """
    with file.open(encoding=text_encoding(file)) as stream:
        reader = JsonStream(stream)
        try:
            for _ in reader.elements():
                yield reader.decode()
            reader.finish("list")
        except (ValueError, RecursionError) as error:
            reason = first_line(error) if isinstance(error, ValueError) else "nested too deeply"
            raise UserError(
                f"{file}, line {reader.line}: not JSON: {reason.removeprefix('not JSON: ')}; export it again"
            ) from None


def _opening(file: Path) -> str:
    try:
        with file.open(encoding=text_encoding(file)) as stream:
            return JsonStream(stream).peek()
    except (ValueError, OSError):
        return ""


class _Builder(ElementTree.TreeBuilder):
    """Collects finished elements, and refuses a document type: its entities could expand without end or name files."""

    def __init__(self, tags: Container[str]) -> None:
        super().__init__()
        self.root = ""
        self.finished: list[ElementTree.Element] = []
        self._tags = tags
        self._open: list[ElementTree.Element] = []

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise UserError("it has a document type (DOCTYPE), which labels do not need; remove that line")

    def start(self, tag: str, attrs: dict[str, str], /) -> ElementTree.Element:
        element = super().start(tag, attrs)
        self.root = self.root or tag
        self._open.append(element)
        return element

    def end(self, tag: str, /) -> ElementTree.Element:
        element = super().end(tag)
        self._open.pop()
        if tag in self._tags and not any(outer.tag in self._tags for outer in self._open):
            self.finished.append(element)
            if self._open:  # what was read needs no more memory
                self._open[-1].remove(element)
        return element


def xml_elements(file: Path, tags: Container[str]) -> Iterator[ElementTree.Element]:
    """Yield the outermost elements with these tags, one at a time.

    Raises:
        UserError: If the file is not XML, has a document type, or ends early.
    """
    builder = _Builder(tags)
    parser = ElementTree.XMLParser(target=builder)
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 16):
                parser.feed(chunk)
                yield from builder.finished
                builder.finished.clear()
        parser.close()
    except ElementTree.ParseError as error:
        raise UserError(f"{file}: not XML: {error}; export it again") from None
    except (UserError, LookupError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None
    yield from builder.finished


def xml_root(file: Path) -> str:
    """Return the tag of an XML file's root; an empty text if it is not XML.

    A file with a document type counts as `annotations` if it names them, so that reading it reports the problem.
    """
    builder = _Builder(())
    with file.open("rb") as stream:
        head = stream.read(1 << 16)
    try:
        ElementTree.XMLParser(target=builder).feed(head)
    except UserError:
        return "annotations" if b"<annotations" in head else ""
    except (ElementTree.ParseError, LookupError, ValueError):
        pass
    return builder.root
