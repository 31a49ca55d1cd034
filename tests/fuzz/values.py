"""Hostile values: JSON with the keys that readers look for, texts of fragments that parsers know, files with edits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from hypothesis import strategies as st

Content = TypeVar("Content", str, bytes)
KEYS = [
    "id",
    "image",
    "images",
    "conversations",
    "messages",
    "from",
    "value",
    "role",
    "content",
    "type",
    "text",
    "question",
    "answer",
    "caption",
    "captions",
    "instances",
    "category",
    "bbox",
    "boxes",
    "label",
    "width",
    "height",
    "annotations",
    "categories",
    "image_id",
    "category_id",
    "file_name",
    "name",
    "iscrowd",
    "question_id",
    "choices",
    "hint",
    "path",
    "bytes",
    "base",
    "mm_vision_tower",
    "mm_projector_type",
    "system",
    "box_unit",
    "box_format",
    "answer_id",
    "url",
]
_TEXTS = st.text(max_size=8) | st.sampled_from(
    ["<image>", "human", "gpt", "user", "assistant", "a.png", "../a", "A", "", " ", "\ud800", "\0", "<s>", "pixel", "1"]
)
_NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 10**30, 1e308, True, False])
_SCALARS = st.none() | _NUMBERS | _TEXTS
Json: st.SearchStrategy[Any] = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4), max_leaves=12
)
"""Any JSON value."""


def json_like() -> st.SearchStrategy[Any]:
    """JSON whose objects have keys that readers know."""
    keys = st.sampled_from(KEYS)
    return st.recursive(
        _SCALARS | st.lists(_NUMBERS, min_size=4, max_size=4),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, min_size=1, max_size=6),
        max_leaves=16,
    )


def json_text() -> st.SearchStrategy[str]:
    """The same as text."""
    return json_like().map(json.dumps)


def said(roles: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A message of a conversation, in LLaVA's form or as a chat has it."""
    parts = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "x"]), "text": _TEXTS | Json}))
    return st.fixed_dictionaries({"from": roles, "value": _TEXTS | Json}) | st.fixed_dictionaries(
        {"role": roles, "content": _TEXTS | parts | Json}
    )


def soup(fragments: Sequence[str]) -> st.SearchStrategy[str]:
    """Fragments in any order, and other letters between them."""
    return st.lists(st.sampled_from(list(fragments)) | st.text(max_size=3), max_size=20).map("".join)


def edited(content: Content, edits: Sequence[tuple[int, int, Content]]) -> Content:
    """A content in which, at some places, some of it is replaced."""
    for place, length, new in edits:
        start = place % (len(content) + 1)
        content = content[:start] + new + content[start + length :]
    return content


_PROBLEM = {
    "question": "Q?",
    "choices": ["a", "b"],
    "answer": 1,
    "hint": "",
    "image": None,
    "lecture": "L",
    "solution": "S",
}


def rows_of(value: st.SearchStrategy[Any], *, science: bool = False, splits: bool = False) -> st.SearchStrategy[Any]:
    """A file's content: a list, an object or lines of rows, or what is left of one after some edits."""
    if science:
        field = st.sampled_from(sorted(_PROBLEM))
        problem = st.dictionaries(field, value, max_size=3).map(lambda changed: _PROBLEM | changed)
        text = st.dictionaries(st.sampled_from("abc"), problem | value, max_size=3).map(json.dumps)
    elif splits:
        ids = st.lists(st.sampled_from("abc") | value, max_size=3) | value
        text = st.dictionaries(st.sampled_from(["train", "test"]), ids, max_size=2).map(json.dumps)
    else:
        rows = st.lists(value, max_size=4)
        lines = rows.map(lambda found: "\n".join(map(json.dumps, found)))
        table = soup(["image", "question", "answer", "caption", ",", ",", "\n", "\n", '"', "\t", ";", "a.png"])
        text = rows.map(json.dumps) | value.map(json.dumps) | lines | table
    edits = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 9), st.binary(max_size=5)), max_size=2)
    return st.builds(edited, text.map(lambda found: found.encode("utf-8", "surrogatepass")), edits)
