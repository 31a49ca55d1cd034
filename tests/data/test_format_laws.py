"""Whatever a row holds, it is read as a conversation or refused with a `RowError`."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from lora_llava.data.formats import RowError, read_row

TEXT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(0, 9)
    | st.binary(max_size=2)
    | st.sampled_from(["", "x", "a.png", "<image>"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "image", "path", "bytes", "url", "role"]), inner, max_size=3)
    ),
    max_leaves=5,
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url"])},
    optional={"text": st.just("x") | ODD, "image": ODD, "path": ODD, "url": ODD, "image_url": ODD},
)
CONTENT = st.sampled_from(["x", "<image>\nx", ""]) | st.lists(PART, max_size=3) | ODD
MESSAGE = (
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system"]),
            "from": st.sampled_from(["human", "gpt"]),
            "content": CONTENT,
            "value": CONTENT,
        },
    )
    | ODD
)
ROW = st.fixed_dictionaries(
    {},
    optional={
        "conversations": st.lists(MESSAGE, max_size=4) | ODD,
        "messages": st.lists(MESSAGE, max_size=4) | ODD,
        "image": ODD,
        "images": ODD,
        "question": ODD,
        "answer": ODD,
        "caption": ODD,
        "system": ODD,
        "id": ODD,
    },
)


@given(row=ROW, form=st.sampled_from(["conversations", "captions"]))
@example(
    row={"image": "a.png", "messages": [{"role": "system", "content": "In <image>"}, *TEXT]}, form="conversations"
)  # StopIteration
@example(
    row={"conversations": [{"from": "human", "value": "x", "content": [5]}, {"from": "gpt", "value": "x"}]},
    form="captions",
)
def test_any_row_is_a_conversation_or_refused(row: dict[str, Any], form: Any) -> None:
    try:
        found = read_row(row, 0, form=form)
    except RowError as error:
        assert error.kind  # noqa: PT017
        return
    assert sum(turn.text.count("<image>") for turn in found.turns) == len(found.images)
    assert [turn.role for turn in found.turns if turn.role != "system"] == ["user", "assistant"] * (
        len(found.turns) // 2
    )
    assert all(turn.text.strip() for turn in found.turns if turn.role != "system")
