"""Reading files of labels as other tools write them: JSON objects and lists, and XML without entities."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lora_llava.core.errors import UserError
from lora_llava.data.files.json_stream import JsonStream
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
    return next(json_list(file), None)


def json_list(file: Path) -> Iterator[Any]:
    """Yield the elements of the list in a JSON file, one at a time; it ends where the text is not JSON."""
    with file.open(encoding=text_encoding(file)) as stream:
        reader = JsonStream(stream)
        try:
            for _ in reader.elements():
                yield reader.decode()
        except (ValueError, RecursionError):
            return


def _opening(file: Path) -> str:
    try:
        with file.open(encoding=text_encoding(file)) as stream:
            return JsonStream(stream).peek()
    except (ValueError, OSError):
        return ""


class _NoEntities(ElementTree.TreeBuilder):
    """Refuses a document type, and with it entities, which could expand without end or name other files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise UserError("it has a document type (DOCTYPE), which labels do not need; remove that line")


def xml_elements(file: Path, tags: tuple[str, ...]) -> Iterator[ElementTree.Element]:
    """Yield the outermost elements with these tags, one at a time.

    Raises:
        UserError: If the file is not XML, has a document type, or ends early.
    """
    parser = ElementTree.XMLPullParser(("start", "end"), _parser=ElementTree.XMLParser(target=_NoEntities()))
    depth: list[ElementTree.Element] = []
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 16):
                parser.feed(chunk)
                yield from _finished(parser, depth, tags)
        parser.close()
        yield from _finished(parser, depth, tags)
    except ElementTree.ParseError as error:
        raise UserError(f"{file}: not XML: {error}; export it again") from None
    except (UserError, LookupError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None


def _finished(
    parser: ElementTree.XMLPullParser[Any], depth: list[ElementTree.Element], tags: tuple[str, ...]
) -> Iterator[ElementTree.Element]:
    for event, element in parser.read_events():
        if event == "start":
            depth.append(element)
            continue
        depth.pop()
        if element.tag in tags and not any(outer.tag in tags for outer in depth):
            yield element
            element.clear()
            if depth:
                depth[-1].remove(element)


def xml_root(file: Path) -> str:
    """Return the tag of an XML file's root; an empty text if it is not XML."""
    try:
        with file.open("rb") as stream:
            parser = ElementTree.XMLPullParser(("start",), _parser=ElementTree.XMLParser(target=_NoEntities()))
            parser.feed(stream.read(1 << 16))
            return next((str(element.tag) for _, element in parser.read_events()), "")
    except (ElementTree.ParseError, UserError, LookupError, ValueError):
        return ""
