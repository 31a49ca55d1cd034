"""The preview's page gives back exactly what is trained, and no text of a sample does anything on it."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.pages.preview_page import render_page
from lora_llava.pages.preview_samples import (
    Preview,
    PreviewRow,
    PreviewSample,
    PreviewToken,
    describe_row,
    escape_hidden,
    share,
)
from lora_llava.pages.preview_terminal import print_samples

IMAGE_TOKEN_ID = 32000
HOSTILE = (
    "<script>alert(1)</script>",
    "[/INST]",
    "[bold red]",
    "</article>",
    "</span>",
    "\"'&lt;&#0;",
    "\x00\x1b[31m\x9b",
    "\ud800",
    "\u202e\u2066",
    "▁שלום",
    "",
    "▁ ▁",
    "a\nb\r\n",
    "<0x0A>",
    "\ufeff\ufe0f\u3164",
    "é́",
    "-->",
    "]]>",
)
TEXT = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=()), max_size=8))


class Page(HTMLParser):
    """Reads a page back as a test needs it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.articles: list[dict[str, str]] = []
        self.boxes: list[list[tuple[dict[str, str], str]]] = []
        self.texts: dict[str, list[str]] = {"style": [], "script": [], "p": [], "option": []}
        self._open: str | None = None
        self._in_box = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.tags.append((tag, named))
        if tag == "article":
            self.articles.append(named)
            self.boxes.append([])
        if tag == "span" and "data-id" in named:
            self.boxes[-1].append((named, ""))
            self._in_box = True
        if tag in self.texts:
            self.texts[tag].append("")
            self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._in_box = self._in_box and tag != "span"
        self._open = None if tag == self._open else self._open

    def handle_data(self, data: str) -> None:
        if self._in_box:
            named, text = self.boxes[-1][-1]
            self.boxes[-1][-1] = (named, text + data)
        elif self._open:
            self.texts[self._open][-1] += data

    def row(self, number: int) -> tuple[list[int], list[int]]:
        """`input_ids` and `labels` of an article."""
        ids, labels = [], []
        for box, _ in self.boxes[number]:
            ids += [int(box["data-id"])] * int(box["data-n"])
            labels += [int(box["data-id"]) if "on" in box["class"].split() else IGNORE_INDEX] * int(box["data-n"])
        return ids, labels

    def all(self, tag: str) -> list[dict[str, str]]:
        return [named for name, named in self.tags if name == tag]


def sample_of(
    *pieces: tuple[int, str, bool],
    source: str = "chat",
    row_id: str = "7",
    images: tuple[Image.Image, ...] = (),
    row: int = 0,
) -> PreviewSample:
    """A sample of (id, text, trained); an image token stands for 576."""
    tokens, position = [], 0
    for token_id, text, trained in pieces:
        is_image = token_id == IMAGE_TOKEN_ID
        tokens.append(PreviewToken(token_id, text, trained, position, 576 if is_image else 1, is_image))
        position += tokens[-1].count
    return PreviewSample(source, row_id, tuple(tokens), images, row)


def preview_of(*samples: PreviewSample, capacity: int = 0) -> Preview:
    """A preview with every sample in a row of its own."""
    rows = tuple(PreviewRow((i,), (sample.length,), capacity) for i, sample in enumerate(samples))
    return Preview("Samples", (("recipe", "a.yaml"),), samples, rows)


CAT = sample_of(
    (1, "<s>", False),
    (IMAGE_TOKEN_ID, "<image>", False),
    (13, "<0x0A>", False),
    (263, "▁a", True),
    (6635, "▁cat", True),
    (2, "</s>", True),
    row_id="cat",
    images=(Image.new("RGB", (336, 336), "red"),),
)
PACKED = Preview(
    "Packed",
    (),
    tuple(
        sample_of(*[(5, "x", True)] * length, row=row, source=source)
        for length, row, source in ((30, 0, "a"), (9, 1, "b"), (60, 0, "a"))
    ),
    (PreviewRow((0, 2, -1), (30, 60, 7), 100), PreviewRow((1,), (9,), 0, 3)),
)


def test_ids_and_labels_come_back() -> None:
    ids, labels = Page(render_page(preview_of(CAT))).row(0)
    assert ids == [1, *[IMAGE_TOKEN_ID] * 576, 13, 263, 6635, 2]
    assert labels == [IGNORE_INDEX] * 578 + [263, 6635, 2]


@settings(max_examples=200)
@given(pieces=st.lists(st.tuples(st.integers(0, 32000), TEXT, st.booleans()), max_size=6), name=TEXT, source=TEXT)
@example(pieces=[(n, text, n % 2 == 0) for n, text in enumerate(HOSTILE)], name=HOSTILE[0], source=HOSTILE[3])
def test_no_text_changes_what_comes_back(pieces: list[tuple[int, str, bool]], name: str, source: str) -> None:
    hostile = sample_of(*pieces, row_id=name, source=source)
    html = render_page(preview_of(hostile, CAT))
    page = Page(html)
    ids, labels = page.row(0)
    assert ids == [i for i, _, _ in pieces for _ in range(576 if i == IMAGE_TOKEN_ID else 1)]
    assert labels == [
        i if trained else IGNORE_INDEX for i, _, trained in pieces for _ in range(576 if i == IMAGE_TOKEN_ID else 1)
    ]
    assert page.row(1) == Page(render_page(preview_of(CAT))).row(0)
    assert [(a["data-row-id"], a["data-source"]) for a in page.articles] == [
        (escape_hidden(name), escape_hidden(source)),
        ("cat", "chat"),
    ]
    assert [box["title"].partition(": ")[2] for box, _ in page.boxes[0]] == [
        escape_hidden(text) for _, text, _ in pieces
    ]
    assert [len(page.all(tag)) for tag in ("script", "article", "style")] == [1, 2, 1]
    html.encode("utf-8")
    assert {c for c in html if unicodedata.category(c)[0] == "C"} == {"\n"}


def test_what_a_box_shows() -> None:
    texts = ("▁dog", "a b", "<0x0A>", "\n\n", "\u202e", "\x1b[0m", "&lt;")
    page = Page(render_page(preview_of(sample_of(*[(n, text, False) for n, text in enumerate(texts)]), CAT)))
    assert [text for _, text in page.boxes[0]] == ["▁dog", "a␣b", "⏎", "⏎⏎", "U+202E", "U+001B[0m", "&lt;"]
    assert len(page.all("br")) == 4  # one, two, and CAT's
    assert [text for _, text in page.boxes[1]] == ["<s>", "image × 576", "⏎", "▁a", "▁cat", "</s>"]
    assert [box["class"] for box, _ in page.boxes[1]] == ["t", "im", "t", "on", "on", "on"]
    assert page.boxes[1][1][0]["title"] == "id 32000, position 1-576, not trained: <image>"
    assert page.boxes[1][3][0]["title"] == "id 263, position 578, trained: ▁a"


def test_what_is_hidden_is_written_out() -> None:
    assert escape_hidden("a\u00a0\u2028\u200d\ufe0f\u3164\U000e0041") == "aU+00A0U+2028U+200DU+FE0FU+3164U+E0041"
    seen = "a é שלום 猫 🐈 ▁ ⟦"
    assert escape_hidden(seen) == seen


def test_an_image_position_that_is_trained_shows() -> None:
    page = Page(render_page(preview_of(sample_of((IMAGE_TOKEN_ID, "<image>", True)))))
    assert page.boxes[0][0][0]["class"] == "im on"
    assert page.row(0)[1] == [IMAGE_TOKEN_ID] * 576


def test_the_page_reaches_nothing_and_allows_only_its_own_script() -> None:
    page = Page(render_page(preview_of(CAT)))
    digest = base64.b64encode(hashlib.sha256(page.texts["script"][0].encode()).digest()).decode()
    policies = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    ]
    names = [name for name, _ in page.tags]
    assert names.index("meta") < names.index("style") < names.index("script")
    addresses = [named[key] for _, named in page.tags for key in ("src", "href", "action", "data") if key in named]
    assert addresses
    assert [a[:40] for a in addresses if not a.startswith(("#", "data:image/jpeg;base64,"))] == []
    assert "url(" not in page.texts["style"][0]
    assert "@import" not in page.texts["style"][0]
    assert "unicode-bidi: isolate" in page.texts["style"][0]
    assert [name for _, named in page.tags for name in named if name.startswith("on")] == []


def test_an_image_is_embedded_once_and_shown_wherever_it_belongs() -> None:
    red, blue = Image.new("RGB", (336, 336), "red"), Image.new("RGB", (336, 336), "blue")
    samples = [sample_of((1, "<s>", False), images=p) for p in ((red, blue), (blue.copy(),), ())]
    page = Page(render_page(preview_of(*samples)))
    assert [use["href"] for use in page.all("use")] == ["#p0", "#p1", "#p1"]
    assert [symbol["id"] for symbol in page.all("symbol")] == ["p0", "p1"]
    shown = [Image.open(io.BytesIO(base64.b64decode(i["href"].partition(",")[2]))) for i in page.all("image")]
    assert [(image.format, image.size) for image in shown] == [("JPEG", (336, 336)), ("JPEG", (336, 336))]
    assert [image.getpixel((9, 9)) for image in shown] == [(254, 0, 0), (0, 0, 254)]


def test_samples_can_be_reached_by_number_and_by_source() -> None:
    page = Page(render_page(PACKED))
    assert [article["id"] for article in page.articles] == ["1", "2", "3"]
    assert page.texts["option"] == ["all (3)", "a (2)", "b (1)"]
    assert [option.get("value") for option in page.all("option")] == [None, "a", "b"]
    assert {"previous", "next", "place", "source"} <= {named.get("id") for _, named in page.tags}
    assert [article.get("hidden") for article in page.articles] == [None] * 3  # without JavaScript all are there


def test_the_bar_of_a_row_holds_its_samples_and_what_is_unused() -> None:
    page = Page(render_page(PACKED))
    cells = [
        (tag, named.get("href"), named["style"], "aria-current" in named)
        for tag, named in page.tags
        if named.get("style", "").startswith("flex-grow")
    ]
    first = [("a", "#1", "flex-grow:30", True), ("a", "#3", "flex-grow:60", False)]
    rest = [("b", None, "flex-grow:7", False), ("b", None, "flex-grow:3", False)]
    second = [("a", "#2", "flex-grow:9", True), ("b", None, "flex-grow:3", False)]
    third = [(tag, href, style, not here) for tag, href, style, here in first]
    assert cells == [*first, *rest, *second, *third, *rest]
    assert [text for text in page.texts["p"] if text.startswith("row")] == [
        "row 1: 3 samples, 97 of 100 tokens, 97%",
        "row 2: 1 sample, 9 tokens, 3 padding",
        "row 1: 3 samples, 97 of 100 tokens, 97%",
    ]


def test_how_full_a_row_is() -> None:
    row = PreviewRow((0, 1, 2, 3, 4), (3000, 900, 80, 6, 1), 4096)
    assert row.unused == 109
    assert describe_row(Preview("", (), (), (row,)), 0) == "row 1: 5 samples, 3,987 of 4,096 tokens, 97%"
    assert [share(*pair) for pair in ((0, 0), (0, 9), (1, 1000), (1, 4), (999, 1000), (7, 7))] == [
        "0%",
        "0%",
        "under 1%",
        "25%",
        "over 99%",
        "100%",
    ]


def test_a_row_that_is_not_there_is_an_error() -> None:
    with pytest.raises(IndexError):
        render_page(Preview("", (), (CAT,), ()))


def test_a_preview_without_samples() -> None:
    html = render_page(preview_of())
    assert Page(html).articles == []
    assert "There are no samples." in html


def test_fifty_samples_with_photographs_stay_under_five_megabytes() -> None:
    tokens = [(20_000 + n, f"▁token{n}", n > 150) for n in range(250)]
    # Grain in every pixel: 47 kB as a JPEG, where a photograph of this size has 20 to 40.
    grain = (20, 8, 8)
    photos = [
        Image.merge("YCbCr", [Image.effect_noise((336, 336), sigma) for sigma in grain]).convert("RGB")
        for _ in range(50)
    ]
    samples = [sample_of(*tokens, row=n, images=(photo,)) for n, photo in enumerate(photos)]
    assert len(render_page(preview_of(*samples, capacity=2048)).encode()) < 5_000_000


def printed(preview: Preview, **options: object) -> str:
    stream = io.StringIO()
    fields: dict[str, object] = {"width": 40, "color_system": None, "force_terminal": False, "_environ": {}}
    print_samples(preview, Console(file=stream, **fields | options))  # type: ignore[arg-type]
    return stream.getvalue()


def test_the_terminal_without_colour() -> None:
    assert [line.rstrip() for line in printed(preview_of(CAT, capacity=1000)).splitlines()] == [
        "Samples",
        "recipe: a.yaml",
        "",
        "1 of 1  chat  cat",
        "581 tokens, 3 trained (under 1%), 1",
        "image, row 1",
        "<s><image × 576>⏎",
        "⟦ a cat</s>⟧",
        "",
        "row 1: 1 sample, 581 of 1,000 tokens,",
        "58%",
        "█" * 23 + "·" * 17,
    ]


def test_the_terminal_in_colour() -> None:
    text = printed(preview_of(CAT), color_system="standard", force_terminal=True)
    assert re.findall("\x1b\\[1;7;32m(.*?)\x1b\\[0m", text) == [" a", " cat", "</s>"]
    assert "⟦" not in text
    plain = printed(preview_of(CAT), color_system="standard", force_terminal=True, no_color=True)
    assert "⟦ a cat</s>⟧" in re.sub("\x1b\\[[0-9;]*m", "", plain)


def test_the_bars_of_the_terminal() -> None:
    bars = re.findall(r"^[█▓░·]+$", printed(PACKED, width=50), re.MULTILINE)
    assert bars == ["█" * 15 + "▓" * 30 + "█" * 3 + "·" * 2, "█" * 38 + "░" * 12]
    assert [len(bar) for bar in re.findall(r"^[█▓░·]+$", printed(PACKED, width=300), re.MULTILINE)] == [100, 100]


@given(texts=st.lists(TEXT, max_size=5), name=TEXT, colour=st.booleans())
@example(texts=list(HOSTILE), name="[/INST]\x1b[2J", colour=True)
def test_no_text_drives_the_terminal(texts: list[str], name: str, colour: bool) -> None:
    preview = preview_of(sample_of(*[(n, text, n % 2 == 1) for n, text in enumerate(texts)], row_id=name, source=name))
    options = {"color_system": "standard", "force_terminal": True} if colour else {}
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed(preview, width=10_000, **options))
    text.encode("utf-8")
    assert {c for c in text if unicodedata.category(c)[0] == "C"} == {"\n"}
    for each in texts:
        assert each == "<0x0A>" or escape_hidden(each.replace("▁", " ").split("\n")[0]) in text
    assert f"  {escape_hidden(name)}  {escape_hidden(name)}" in text
